"""Trees as training rows: what turns share is computed once, and the loss of each token is the same as if its history
stood before it alone (positions by depth, a mask of ancestors).

    training_rows    trees and what their turns weigh -> rows; each tree pruned to the ancestors of what bears loss
    token_logp       log pi of a row's targets, each given its ancestors; packed_nll weighs and sums them
"""
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from config import UserError
from leafe import Tree
from forward import Part, Seen, hidden, logits
from lora import general

LOGITS_BYTES = 300 * 2**20
Weights = dict[int, tuple]              # turn -> what each of its action's tokens weighs: a number for each loss


@dataclass
class Segment:
    """A run of tokens in a tree. Its context is the chain of parents."""
    ids: list[int]
    weights: list                       # per token: a number, or one for each loss (a tuple); 0: no loss
    parent: int | None                  # index in the same list, earlier than this one


@dataclass
class Packed:
    """One row of whole token trees."""
    ids: torch.Tensor                   # (T,)
    positions: torch.Tensor             # (T,) depth in its tree, in tokens
    owner: torch.Tensor                 # (T,) the segment that a token is of
    above: torch.Tensor                 # (S, S) bool: segment j is an ancestor of i, or i itself
    targets: torch.Tensor               # (N,) tokens that bear loss
    sources: torch.Tensor               # (N,) their predecessors in the tree
    weights: torch.Tensor               # (N, C), one column a loss
    sizes: list[int]                    # tokens of each tree

    def mask(self, device: torch.device | None = None) -> torch.Tensor:
        """(T, T) bool: token j is an ancestor of i, or i itself; ancestors come before their descendants. Made when
        and where it is needed: kept for every row, it would be most of the memory, and a GPU makes its own."""
        above, owner = self.above.to(device), self.owner.to(device)
        return above[owner][:, owner].tril()

    def parts(self) -> list[Part]:
        """No token sees another tree: a row costs the squares of its trees' lengths and not that of its own."""
        ends = torch.tensor(self.sizes).cumsum(0).tolist()
        trees = [slice(end - size, end) for end, size in zip(ends, self.sizes)]
        return [Part(tree, 0, tree) for tree in trees]


@dataclass
class Batch:
    """What one optimiser step sees."""
    rows: list[Packed]
    scale: float                        # of the rows' losses
    lr: float                           # share of the peak learning rate
    resume: int | None                  # what to go on from after this step; None: no checkpoint here


def length(tree: list[Segment]) -> int:
    return sum(len(segment.ids) for segment in tree)


def segments(tree: Tree, weights: Weights) -> list[Segment]:
    """The tree, pruned to the ancestors of the turns that bear loss. weights: turn -> its tokens' weights."""
    kept = sorted({a for turn in weights for a in tree.ancestors(turn)})
    place = {turn: n for n, turn in enumerate(kept)}
    found = []
    none = (0.0,) * len(next(iter(weights.values())))
    for i in kept:
        turn = tree.turns[i]
        loss = [none] * len(turn.obs_ids) + [weights.get(i, none)] * len(turn.action_ids)
        found.append(Segment(turn.ids, loss, place.get(turn.parent)))
    return found


def fill(pieces: list[list[Segment]], row_tokens: int) -> list[list[list[Segment]]]:
    """Token trees, none larger than row_tokens, in groups of at most that many tokens, in order."""
    rows, room = [], 0
    for piece in pieces:
        size = length(piece)
        if size > room:
            rows.append([])
            room = row_tokens
        rows[-1].append(piece)
        room -= size
    return rows


def rows_of(trees: list[Tree], weights: list[Weights], row_tokens: int) -> list[list[list[Segment]]]:
    """Groups of pruned trees of at most row_tokens tokens each; a larger tree is split by its targets.
    Raises UserError if one target with its history is too large."""
    todo = [(tree, w) for tree, w in zip(trees, weights, strict=True) if w]
    pieces = []
    while todo:
        tree, w = todo.pop(0)
        piece, turns = segments(tree, w), sorted(w)
        if length(piece) <= row_tokens:
            pieces.append(piece)
        elif middle := len(turns) // 2:
            todo[:0] = [(tree, {i: w[i] for i in part}) for part in (turns[:middle], turns[middle:])]
        else:                                            # only where trees= come from a run with a larger context
            raise UserError(f"row_tokens: {row_tokens} are too few for a turn and its history of {length(piece)} tokens; "
                            f"raise it")
    return fill(pieces, row_tokens)


def training_rows(trees: list[Tree], weights: list[Weights], row_tokens: int) -> list[Packed]:
    """A method's data, packed."""
    return [pack(group) for group in rows_of(trees, weights, row_tokens)]


def pack(trees: list[list[Segment]]) -> Packed:
    """One row from whole trees, a shared prefix in it once. Exact: test_packed_equals_one_pair_at_a_time."""
    above = torch.eye(sum(map(len, trees)), dtype=torch.bool)    # (S, S): segment j is an ancestor of i, or i
    tokens, node = [], 0                                         # of each token: id, depth, weight, predecessor, i
    for tree in trees:
        base, ends = node, []
        for segment in tree:
            # h: a segment goes on where its parent ended, wherever that lies in the row
            last, depth = -1, 0
            if segment.parent is not None:
                above[node] |= above[base + segment.parent]
                last, depth = ends[segment.parent]
            for token, weight in zip(segment.ids, segment.weights, strict=True):
                tokens.append((token, depth, weight, last, node))
                last, depth = len(tokens) - 1, depth + 1
            ends.append((last, depth))
            node += 1
    # a: the tokens that bear loss, and where each is predicted from
    ids, positions, weights, previous, owner = map(list, zip(*tokens))
    weight, before = torch.tensor(weights).view(len(ids), -1), torch.tensor(previous)          # (T, C), (T,)
    targets = ((weight != 0).any(1) & (before >= 0)).nonzero()[:, 0]
    return Packed(torch.tensor(ids), torch.tensor(positions), torch.tensor(owner), above, targets, before[targets],
                  weight[targets], list(map(length, trees)))


def halves(row: Packed) -> list[Packed]:
    """Two rows of half of its targets each, pruned to what these descend from."""
    middle = len(row.targets) // 2
    return [part_of(row, slice(0, middle)), part_of(row, slice(middle, None))]


def part_of(row: Packed, part: slice) -> Packed:
    bearing = row.owner[row.targets[part]].unique()
    above = row.above[bearing].any(0)                            # (S,) segments that stay
    stays = above[row.owner]                                     # (T,)
    place, number = stays.cumsum(0) - 1, above.cumsum(0) - 1     # of tokens, of segments
    sizes = [size for size in (int(tree.sum()) for tree in stays.split(row.sizes)) if size]
    return Packed(row.ids[stays], row.positions[stays], number[row.owner[stays]], row.above[above][:, above],
                  place[row.targets[part]], place[row.sources[part]], row.weights[part], sizes)


def token_logp(model, rows: list[Packed]) -> torch.Tensor:
    """log pi(token | its ancestors) of the rows' targets, one row after the other: (N,), with gradient.
    Logits are computed at the targets only, and in chunks of LOGITS_BYTES, each again for its gradient: a large
    vocabulary costs no (N, V) tensor (512 targets of 150,000 tokens are a chunk)."""
    if not getattr(model, "packs", True):
        return general().token_logp(model, rows)
    device = next(model.parameters()).device
    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long, device=device)
    positions = torch.zeros_like(ids)
    mask = torch.eye(longest, dtype=torch.bool, device=device).repeat(len(rows), 1, 1)  # padding sees itself: no empty row
    for b, row in enumerate(rows):
        # each token sees its ancestors and itself: as if its history stood before it alone
        n = len(row.ids)
        ids[b, :n], positions[b, :n] = row.ids, row.positions
        mask[b, :n, :n] = row.mask(device)
    seen = Seen(mask, positions, positions, rows[0].parts() if len(rows) == 1 else [])
    states = hidden(model, ids, seen, use_cache=False)                                            # (B, T, D)
    # by `embedding`, for its gradient: children of one token add to it in order, however many threads there are
    picked = torch.cat([nn.functional.embedding(row.sources.to(device), states[b])
                        for b, row in enumerate(rows)])                                          # (N, D)
    labels = torch.cat([row.ids[row.targets] for row in rows]).to(device)
    size = max(1, LOGITS_BYTES // (4 * model.config.get_text_config().vocab_size))
    if len(labels) <= size:
        return logp_of(model, picked, labels)
    return torch.cat([checkpoint(logp_of, model, *part, use_reentrant=False)
                      for part in zip(picked.split(size), labels.split(size))])


def logp_of(model, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:          # (N, D), (N,) -> (N,)
    return -nn.functional.cross_entropy(logits(model, states).float(), labels, reduction="none")


def packed_nll(model, rows: list[Packed]) -> torch.Tensor:
    """Weighted sums of -log pi(token | its ancestors) over the rows' targets: (C,), one a loss, with gradient."""
    logp = token_logp(model, rows)
    return -logp @ torch.cat([row.weights for row in rows]).to(logp.device)
