"""The engine's KV cache: rows of keys and values that conversations live in, and copies of them that branches fork from."""
from dataclasses import dataclass

import torch


@dataclass
class Snapshot:
    ids: list[int]
    layers: list[tuple[torch.Tensor, torch.Tensor]]      # (H, len(ids), D) each
    version: tuple

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self.layers)


class SlotCache:
    """A cache as transformers' decoders see it: they call update(), and ask for sizes. Row i of each
    layer's (rows, H, columns, D) belongs to one conversation, left-aligned. There are as many rows as were live at
    once so far, at most `slots`, and as many columns as the longest had, at most `capacity`."""
    def __init__(self, slots: int, capacity: int, ragged: bool = True):
        self.slots, self.capacity, self.ragged, self.held, self.columns = slots, capacity, ragged, 0, 0
        self.layers: list[list[torch.Tensor]] = []       # keys and values of each

    def hold(self, rows: int, columns: int) -> None:
        """Have room for so many conversations of so many tokens; rows double, columns grow by 256."""
        if rows > self.held:
            rows = min(self.slots, max(rows, 2 * self.held))
        rows, columns = max(rows, self.held), max(min(self.capacity, -(-columns // 256) * 256), self.columns)
        for layer in self.layers:                        # one after the other: no second cache beside the first
            for n, old in enumerate(layer):
                if len(old) < rows or old.shape[2] < columns:
                    layer[n] = old.new_zeros(max(rows, len(old)), old.shape[1], max(columns, old.shape[2]), old.shape[3])
                    layer[n][:len(old), :, :old.shape[2]] = old
        self.held, self.columns = rows, columns

    def aim(self, rows: torch.Tensor, at: torch.Tensor, span: int) -> None:
        """Where the next forward's tokens go: columns at (B, T), below `span`, of rows (B, T)."""
        self.rows, self.at, self.span = rows, at, span

    def update(self, k: torch.Tensor, v: torch.Tensor, layer: int, *_, **__) -> tuple[torch.Tensor, torch.Tensor]:
        if layer == len(self.layers):                    # (B, H, T, D); latent keys and values differ in H and D
            self.layers.append([x.new_zeros(self.held, x.shape[1], self.columns, x.shape[3]) for x in (k, v)])
        for kept, new in zip(self.layers[layer], (k, v)):
            kept[self.rows, :, self.at] = new.transpose(1, 2)
        if self.ragged:                                  # these stay where they are: forward._attend looks there
            k.kept = self.layers[layer]                  # type: ignore[attr-defined]
            return k, v
        k, v = (kept[self.rows[:, 0], :, :self.span] for kept in self.layers[layer])
        return k, v

    def get_mask_sizes(self, *_) -> tuple[int, int]:
        return self.span, 0

    def get_query_offset(self, *_) -> int:               # what positions would be counted from, were they not given
        return 0
    get_seq_length = get_query_offset

    def read(self, row: int, n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:      # views
        return [(k[row, :, :n], v[row, :, :n]) for k, v in self.layers]

    def write(self, row: int, layers: list[tuple[torch.Tensor, torch.Tensor]], n: int) -> None:
        for (k, v), (new_k, new_v) in zip(self.layers, layers):
            k[row, :, :n].copy_(new_k[:, :n], non_blocking=True)
            v[row, :, :n].copy_(new_v[:, :n], non_blocking=True)


def common_prefix(a: list[int], b: list[int]) -> int:
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else next(i for i in range(n) if a[i] != b[i])
