"""scale/captured.py on the simulated device, which does a graph's operations again without asking Python: the same replies, one copy,
one replay and one wait a step, and every way in which a graph could go stale."""
import gc
import random
import weakref
from collections import deque
from concurrent.futures import Future

import pytest
import torch

import engine as engine_py
import forward
import lora
from conftest import family, shake
from engine import Ask, Engine, Job
from fake_cuda import FakeCuda
from models import check
from models.check import sampled
from run import Policy
from scale import captured
from scale.captured import Steps, bucket
from test_gpu import model_of
from tools.families import tiny_model

LENGTHS = (7, 30, 1, 55, 12, 90)            # so that replies go from one span into the next
ALIKE = (7, 30, 20, 25, 12, 31)


def talk(seed, waiting=None, lengths=LENGTHS):
    """Two or three replies of some tokens; between them a world that may be at work for a while."""
    rng = random.Random(seed)
    ids = [rng.randrange(6, 400) for _ in range(lengths[seed % len(lengths)])]
    if waiting is not None and seed % 4 == 1:
        yield later(waiting)
    for n in range(rng.randrange(2, 4)):
        reply = yield Ask(ids, rng.randrange(6, 24), (0.0, None, 0.4)[(seed + n) % 3])
        if waiting is not None and (seed + n) % 2:
            yield later(waiting)
        ids = ids + reply + [rng.randrange(6, 400) for _ in range(rng.randrange(1, 9))]
    return ids


def later(waiting):
    waiting.append([Future(), 0])
    return waiting[-1][0]


def notes(capsys):
    """What was said, but for the bars of a model that is loaded."""
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith(("note", "out of"))]


def play(engine, count=9, waits=False, lengths=LENGTHS):
    """What came of the episodes, each with where its generator stands. A world answers after three steps."""
    waiting, step = [] if waits else None, engine._step

    def stepped(queue):
        for one in waiting or []:
            one[1] += 1
            everyone = engine.live and all(job.waits_for and not job.waits_for.done() for job in engine.live)
            if not one[0].done() and (one[1] > 3 or everyone):
                one[0].set_result(None)
        step(queue)
    engine._step = stepped
    jobs = [Job(talk(n % 6, waiting, lengths), random.Random(n), str(n % 6), snapshot=n % 2 == 0) for n in range(count)]
    ended = list(engine.run(deque(jobs)))
    assert len(ended) == count == len({id(job) for job in ended}) and not engine.live and not engine.parked
    assert engine.steps is None
    return [(job.result, job.rng.random()) for job in jobs]


@pytest.fixture
def watched(monkeypatch):
    """(rows of the bucket, rows that take part, tokens kept, live rows) of each captured step; with what was kept of each run."""
    seen, plain = [], Steps.logits

    def logits(steps, tails, draws):
        live = len(steps.engine.live)
        found = plain(steps, tails, draws)
        if found:
            seen.append((*max(steps.steps.items(), key=lambda item: list(steps.steps).index(item[0]))[0], len(tails), live))
        return found
    monkeypatch.setattr(Steps, "logits", logits)
    return seen


def uncaptured(steps, key, block):
    """Steps.step, but that each step is done as it is: what is computed in the same shapes without a graph."""
    steps.numbers = torch.zeros(5 * steps.engine.slots, dtype=torch.int64, device=steps.engine.device)
    steps.numbers[:len(block)].copy_(block)
    steps.steps[key] = captured.Step()
    return steps.work(*key)


@pytest.mark.parametrize("adapter, waits", [(True, True), (False, False)])
def test_captured_replies_are_those_of_a_cpu_token_for_token(adapter, waits, settings, watched, capsys):
    """Greedy and sampled, of unlike lengths, forked from snapshots, with rows that wait for their worlds."""
    def replies(cuda, slots):
        model, chat = model_of("float32", adapter)
        return play(Engine(model, {*chat.stop, 9}, settings(f"slots={slots}", "snapshot_mb=64")), waits=waits)
    for slots in (2, 9):
        with FakeCuda() as gpu:
            found = replies(True, slots)
            assert gpu.graphs >= 4 and gpu.calls["replay"] >= 20
        assert found == replies(False, slots)
    rows, spans = {one[0] for one in watched}, {one[1] for one in watched}
    assert {1, 2, 9} <= rows and {64, 128} <= spans
    assert any(one[0] > one[4] for one in watched)                         # a row that is no conversation's
    assert any(one[3] < one[4] for one in watched) == waits                # or one that waits
    assert not notes(capsys)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_graph_computes_what_its_step_does_uncaptured_and_draws_what_it_does(dtype, settings, monkeypatch, watched):
    """In 16 bits another shape rounds otherwise: so beside the same shapes."""
    def replies():
        with FakeCuda() as gpu:
            model, chat = model_of(dtype)
            return play(Engine(model, chat.stop, settings("slots=6", "snapshot_mb=64")), waits=True), gpu.graphs
    found, graphs = replies()
    monkeypatch.setattr(Steps, "step", uncaptured)
    assert graphs >= 4 and replies() == (found, 0) and {one[2] for one in watched} == {True, False}


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral"])
def test_layers_with_windows_and_attention_of_their_own_are_captured_too(name, settings, capsys):
    """gemma2: eager, with soft caps; the others with windows of eight tokens, or grouped heads."""
    tokens, found = [1, 2, 3], {}
    for device in ("cuda", "cpu"):
        with FakeCuda() as gpu:
            engine = Engine(tiny_model(name).to(device), set(), settings("slots=3", "snapshot_mb=0"))
            jobs = [Job((yield_one(n)), random.Random(n), str(n)) for n in tokens]
            list(engine.run(deque(jobs)))
            found[device] = [job.result for job in jobs]
            assert (gpu.calls["replay"] > 5) == (device == "cuda")
    assert found["cuda"] == found["cpu"] and not capsys.readouterr().err


def yield_one(n, new=12, length=9):
    rng = random.Random(n)
    return (yield Ask([rng.randrange(6, 400) for _ in range(length)], new))


def test_a_captured_step_is_one_copy_one_replay_and_one_wait(settings):
    with FakeCuda() as gpu:
        model, chat = model_of()
        for slots in (2, 6):
            engine = Engine(model, set(), settings(f"slots={slots}", "context=256"))
            steps, forwards = [], engine._forward

            def counted(rows, upto=None):
                gpu.clear()
                forwards(rows, upto)
                steps.append((gpu.total("to device"), gpu.total("waits"), gpu.total("to host"), dict(gpu.calls)))
            engine._forward = counted
            list(engine.run(deque(Job(yield_one(n), random.Random(n), str(n)) for n in range(slots))))
            assert steps.count((1, 1, 0, dict(replay=1, copy_=1))) == 10, steps    # of twelve: a warm-up, a capture


def test_a_run_s_graphs_know_its_weights_alone(settings, watched):
    """Weights change between runs, and, by an episode, within one; an adapter is switched off and on."""
    def changes(model):
        yield Ask([7] * 5, 8)
        shake(model, 5, 0.1)
        return (yield Ask([7] * 5, 8))

    def replies(cuda):
        model, chat = model_of("float32")
        engine = Engine(model, set(), settings("slots=4", "snapshot_mb=0"))
        found = [play(engine, 4)]
        shake(model, 2, 0.1)
        engine.drop()
        found.append(play(engine, 4))
        with lora.adapter_off(model):
            found.append(play(engine, 4))
        jobs = [Job(changes(model), random.Random(0), "a"), Job(talk(0), random.Random(1), "b")]
        list(engine.run(deque(jobs)))
        return found, [job.result for job in jobs]
    with FakeCuda() as gpu:
        found = replies(True)
        assert gpu.graphs > 12
    assert found == replies(False)


def test_graphs_go_when_the_cache_grows_and_the_oldest_when_there_are_more_than_are_kept(settings, monkeypatch):
    """256 columns are too few for the longest."""
    def replies():
        engine = Engine(model_of("float32")[0], set(), settings("slots=4", "snapshot_mb=0"))
        jobs = [Job(yield_one(n, 14 * n + 10, 10 + 50 * n), random.Random(n), str(n)) for n in range(6)]
        list(engine.run(deque(jobs)))
        return [job.result for job in jobs]
    kept, look, plain = [], Steps.look, Steps.step

    def looked(steps):
        before = len(steps.steps)
        look(steps)
        kept.append((before, len(steps.steps), steps.engine.cache.columns))

    def step(steps, *args):
        found = plain(steps, *args)
        assert len(steps.steps) <= 3
        return found
    monkeypatch.setattr(captured, "MOST", 3)
    monkeypatch.setattr(Steps, "look", looked)
    monkeypatch.setattr(Steps, "step", step)
    with FakeCuda() as gpu:
        found = replies()
        assert gpu.graphs > 4 and gpu.calls["replay"] > 60 and {one[1] for one in kept} == {0, 1, 2, 3}
    assert any(before and not after for before, after, _ in kept) and {256, 512} <= {one[2] for one in kept}
    assert found == replies()


def host_copy(work):
    def wrong(steps, *key):
        torch.tensor([1.0], device="cuda")
        return work(steps, *key)
    return wrong


def waits_for_it(work):
    def wrong(steps, *key):
        assert steps.numbers.sum().item() is not None
        return work(steps, *key)
    return wrong


def no_memory(work):
    def wrong(steps, *key):
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return work(steps, *key)
    return wrong


def no_memory_before(work):
    def wrong(steps, *key):
        raise torch.OutOfMemoryError("CUDA out of memory")
    return wrong


def test_nothing_of_a_run_s_graphs_is_left_behind_it_though_no_garbage_is_collected(settings):
    gc.collect()
    gc.disable()
    try:
        with FakeCuda() as gpu:
            model, chat = model_of()
            engine = Engine(model, set(), settings("slots=3", "snapshot_mb=0"))
            for _ in engine.run(deque(Job(yield_one(n, 6 + 3 * n), random.Random(n), str(n)) for n in range(3))):
                steps = weakref.ref(engine.steps)
                graphs = [weakref.ref(step.graph) for step in engine.steps.steps.values() if step.graph]
                assert gpu.graphs and graphs
            assert engine.steps is None and steps() is None and all(graph() is None for graph in graphs)
    finally:
        gc.enable()


@pytest.mark.parametrize("fault, says", [
    (host_copy, "operation failed due to a previous error during capture"), (waits_for_it, "operation failed"),
    (no_memory, "OutOfMemoryError: CUDA out of memory"), (no_memory_before, "OutOfMemoryError: CUDA out of memory")])
def test_what_cannot_be_captured_goes_on_uncaptured_and_is_said_once(fault, says, settings, monkeypatch, capsys):
    monkeypatch.setattr(Steps, "work", fault(Steps.work))
    def replies(cuda):
        model, chat = model_of("float32")
        engine = Engine(model, set(), settings("slots=4", "snapshot_mb=64"))
        return [play(engine, 5), play(engine, 5)], model
    with FakeCuda() as gpu:
        found, model = replies(True)
        assert gpu.calls["replay"] == 0 and model.captured is False and gpu.stream is gpu.home
    assert found == replies(False)[0]
    lines = notes(capsys)
    assert len(lines) == 1 and lines[0].startswith("note: decode steps are not captured from here on (") and says in lines[0]


def test_memory_that_runs_out_at_any_place_of_a_captured_step_costs_no_reply(settings, capsys):
    cfg = settings("slots=3", "snapshot_mb=64")
    with FakeCuda(track=True) as gpu:
        model, chat = family("llama", num_hidden_layers=2).to("cuda"), model_of("float32")[1]

        def replies():
            model.captured = True
            return play(Engine(model, chat.stop, cfg), 4, lengths=ALIKE)
        gpu.clear()
        plain, places = replies(), gpu.places
        wanted = [(place, n) for place, count in places.items() if place.startswith("captured.py") for n in sorted({1, count})]
        assert len(wanted) >= 4 and {"captured.py:step", "captured.py:work"} <= set(places)
        for place, n in wanted:
            gpu.clear()
            gpu.fail = place, n
            assert replies() == plain and model.captured is False, (place, n)
            assert gpu.stream is gpu.home
    assert len(notes(capsys)) == len(wanted)


def test_rows_that_go_for_want_of_memory_take_the_graphs_with_them(settings, monkeypatch, capsys):
    """Before the smaller cache is made, no graph holds the larger one."""
    graphs, plain = [], engine_py.SlotCache

    def cache(*args):
        made.append([graph() for graph in graphs])
        return plain(*args)

    def capture(*args):
        step = captured_plainly(*args)
        graphs.append(weakref.ref(step.graph))
        return step
    captured_plainly, made = captured.capture, []
    with FakeCuda(track=True) as gpu:
        model, chat = family("llama", num_hidden_layers=2).to("cuda"), model_of("float32")[1]
        expected = play(Engine(model, chat.stop, settings("slots=4", "snapshot_mb=0")), 6)
        monkeypatch.setattr(engine_py, "SlotCache", cache)
        monkeypatch.setattr(captured, "capture", capture)
        gpu.clear()
        gpu.fail = "engine.py:_hidden", 12
        assert play(Engine(model, chat.stop, settings("slots=4", "snapshot_mb=0")), 6) == expected
    assert notes(capsys) == ["out of memory: going on with slots=2"]
    assert made[0] == [] and len(made[1]) > 0 and not any(made[1])


# what the simulated device must show: each of these would be silent on a real one, or an error far from its cause
def frozen_number(monkeypatch):
    """A number that Python reads, and that is another at the next step."""
    monkeypatch.setattr(forward, "hidden", lambda model, ids, seen, **more: HIDDEN(model, ids, forward.Seen(
        seen.mask, seen.positions * 0 + max(job.cached for job in ENGINE[0].live), seen.keys, seen.parts, seen.places), **more))


def another_input(monkeypatch):
    """The numbers of a step in a tensor of their own."""
    plain = Steps.step

    def step(steps, key, block):
        steps.numbers = None
        return plain(steps, key, block)
    monkeypatch.setattr(Steps, "step", step)


def kept_in_python(monkeypatch):
    """A tensor that is made while a graph is, and that others take for made."""
    plain, kept = forward.logits, []

    def logits(model, hidden):
        if torch.cuda.is_current_stream_capturing():
            kept[:] = [torch.ones(1, device="cuda")]                       # not before a replay
        return plain(model, hidden) * (kept[0] if kept else 1)
    monkeypatch.setattr(forward, "logits", logits)


HIDDEN, ENGINE = forward.hidden, []


@pytest.mark.parametrize("fault", [frozen_number, another_input, kept_in_python])
def test_a_graph_that_went_stale_shows_on_the_simulated_device(fault, settings, monkeypatch, capsys):
    def replies():
        with FakeCuda() as gpu:
            model, chat = model_of("float32")
            ENGINE[:] = [Engine(model, set(), settings("slots=3", "snapshot_mb=0"))]
            jobs = [Job(yield_one(n), random.Random(n), str(n)) for n in range(6)]
            for part in (jobs[:3], jobs[3:]):
                list(ENGINE[0].run(deque(part)))
            assert gpu.graphs
            return [job.result for job in jobs], notes(capsys)
    right, silent = replies()
    fault(monkeypatch)
    found, said = replies()
    assert not silent and (found != right or "illegal memory access" in " ".join(said))


def test_a_graph_whose_memory_was_freed_is_an_error_there_and_none_is_where_the_engine_looks(settings, monkeypatch, capsys):
    """Rows come and go, and the cache grows meanwhile."""
    found = []
    for look in (Steps.look, lambda steps: None):
        monkeypatch.setattr(Steps, "look", look)
        with FakeCuda():
            engine = Engine(model_of("float32")[0], set(), settings("slots=4", "snapshot_mb=0"))
            queue = deque(Job(yield_one(n, new), random.Random(n), str(n)) for n, new in enumerate((8, 50)))
            for n, _ in enumerate(engine.run(queue)):
                queue.extend(Job(yield_one(m, new), random.Random(m), str(m)) for m, new in enumerate((3, 3, 20) if n == 0 else ()))
        found.append("a graph's tensor was freed" in " ".join(notes(capsys)))
    assert found == [False, True]


# the check at load
def test_the_check_at_load_captures_a_step_and_a_key_says_never(settings, capsys):
    with FakeCuda() as gpu:
        for key, graphs in (("captured=true", 1), ("captured=false", 0)):
            model, chat = model_of()
            gpu.clear()
            cfg = settings(key, "slots=3")
            check.check(Policy(model, chat, cfg))
            assert (model.captured, gpu.graphs) == (bool(graphs), graphs) and gpu.calls["replay"] == 4 * graphs
            play(Engine(model, chat.stop, cfg), 4)
            assert (gpu.graphs > 1) == bool(graphs)
    assert not notes(capsys)


def test_without_a_gpu_nothing_is_captured(tiny, settings):
    engine = Engine(*tiny[:1], tiny[1].stop, settings("slots=3"))
    check.check(Policy(*tiny, settings("slots=3")))
    assert tiny[0].captured is False and not engine.captures and list(engine.run(deque())) == [] and engine.steps is None


def test_captured_steps_that_differ_are_off_with_one_line_that_says_by_how_much(settings, monkeypatch, capsys):
    plain = Steps.logits

    def wrong(steps, *args):
        found = plain(steps, *args)
        if found and steps.steps and next(iter(steps.steps.values())).graph:
            found[0].mul_(1.5)
        return found
    monkeypatch.setattr(Steps, "logits", wrong)
    with FakeCuda():
        model, chat = model_of()
        check.check(Policy(model, chat, settings("slots=3")))
        assert model.captured is False and model.forks and model.ragged and model.packs
        assert not Engine(model, chat.stop, settings("slots=3")).captures
    said, = notes(capsys)
    assert said.startswith("note: tiny: decode steps are not captured: captured they differ from the model's own")


def test_what_another_rank_finds_goes_for_all(settings, monkeypatch):
    monkeypatch.setattr(check, "agreed", lambda numbers: [1] if len(numbers) == 1 else numbers)
    with FakeCuda():
        model, chat = model_of()
        check.check(Policy(model, chat, settings("slots=3")))
        assert model.captured is False and model.forks


def test_the_check_sees_the_logits_of_captured_steps(settings):
    with FakeCuda() as gpu:
        model, chat = model_of("float32")
        model.forks, policy = True, Policy(model, chat, settings("slots=3"))
        talks = check.conversations(policy, check.SIZES)
        own = check.own_answers(model, talks)
        gpu.clear()
        found = sampled(policy, talks)
        assert gpu.calls["replay"] == 4 and len(found) == 1 + 3 * check.REPLY
        assert max(float(check.drift(logp, own.logp[n][at])) for n, at, logp in found) < 1e-4


def test_buckets_hold_at_most_half_as_many_again():
    assert [n for n in range(1, 513) if bucket(n) == n] == [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
    assert all(n <= bucket(n) < 2 * n for n in range(1, 513))
