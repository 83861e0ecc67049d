"""Every schedule over a process group that keeps NCCL's manners: what gloo forgives hangs or fails here, by name."""

import re
import time

import pytest
import torch
import torch.distributed as dist

from parallel.groups import start_processes
from parallel.pipeline import engine as engine_module
from parallel.pipeline.connections import connection_order
from parallel.pipeline.engine import Engine, _Channel
from parallel.pipeline.watchdog import Watchdog, process_group_store
from parallel.schedules import SCHEDULES, forward_only, make_schedule
from parallel.world import World
from testing.nccl.device import Event
from testing.nccl.ranks import nccl_rank
from testing.ranks import run_ranks
from testing.toy_stages import ToyStages

WORLD = 8
CPU = torch.device("cpu")


class BusyStages(ToyStages):
    """Toy stages with a collective inside every pass, as experts have, and one that reduces each stage at its end."""

    def __init__(self, schedule, beside, holders):
        super().__init__(schedule)
        self.beside, self.holders, self.reductions = beside, holders, []

    def run(self, *tasks):
        number = torch.ones(1)
        dist.all_reduce(number, group=self.beside)
        assert number.item() == self.beside.size()
        super().run(*tasks)

    def start_reduction(self, stage):
        super().start_reduction(stage)
        gradient = torch.full((3,), float(stage))
        work = dist.all_reduce(gradient, group=self.holders[stage], async_op=True)
        self.reductions.append((work, gradient, stage * self.holders[stage].size()))

    def finish_reductions(self):
        for work, gradient, expected in self.reductions:
            work.wait()
            assert gradient.tolist() == [expected] * 3
        self.reductions.clear()


def sizes_of(name, ranks):
    """Return (microbatches, chunks) for a schedule, or None where it cannot be."""
    if name == "dualpipe" and ranks % 2:
        return None
    return 2 * ranks, 2 if name == "interleaved" else 1


def run_pipelines(ranks):
    """Run every schedule over pipelines of ``ranks`` ranks, as many as the world has room for, as a run would."""
    world = World.from_environment()
    with nccl_rank(world.rank, stuck_seconds=20):
        start_processes(world, CPU, timeout_seconds=60)
        try:
            many = WORLD // ranks
            pipelines = [dist.new_group([r * many + i for r in range(ranks)]) for i in range(many)]
            beside = [dist.new_group([r * many + i for i in range(many)]) for r in range(ranks)]
            mirrors = [
                dist.new_group([q * many + i for q in sorted({r, ranks - 1 - r}) for i in range(many)])
                for r in range(-(-ranks // 2))
            ]
            done = []
            if world.rank < ranks * many:
                rank, number = divmod(world.rank, many)
                done = [
                    _as_in_a_run(name, ranks, pipelines[number], beside[rank], mirrors[min(rank, ranks - 1 - rank)])
                    for name in SCHEDULES
                    if sizes_of(name, ranks)
                ]
            dist.barrier()
            return done
        finally:
            dist.destroy_process_group()


def _as_in_a_run(name, ranks, pipeline, beside, mirror):
    """Evaluate, train a step, save, train another, evaluate; return what was done."""
    microbatches, chunks = sizes_of(name, ranks)
    schedule = make_schedule(name, ranks, microbatches, chunks)
    place = schedule.placement
    held_by = mirror if place.mirrored else beside
    stages = BusyStages(schedule, beside, dict.fromkeys(range(schedule.stages), held_by))
    training = Engine(schedule, pipeline, stages)
    evaluating = Engine(forward_only(place), pipeline, stages)
    for engine in (evaluating, training, None, training, evaluating):
        if engine is None:
            dist.barrier(pipeline)
            continue
        engine.run()
        stages.finish_reductions()
        stages.live.clear()  # what an evaluation leaves
    return name, len(stages.done)


@pytest.mark.parametrize("cases", [(2, 4), pytest.param((3, 5, 6, 7, 8), marks=pytest.mark.full)])
def test_every_schedule_runs_over_two_to_eight_ranks_as_in_a_run(cases):
    for ranks, found in zip(cases, run_ranks(WORLD, run_pipelines, cases, timeout_seconds=200)):
        for name in (n for n in SCHEDULES if sizes_of(n, ranks)):
            schedule = make_schedule(name, ranks, *sizes_of(name, ranks))
            passes = 2 * sum(len(step.parts) for steps in schedule.ranks for step in steps)
            evaluated = 2 * schedule.stages * schedule.microbatches
            many = WORLD // ranks
            assert sum(dict(done).get(name, 0) for done in found) == many * (passes + evaluated), (name, ranks)


# -- what gloo would forgive -------------------------------------------------------------------------------------------


def exchange_two_messages(engine):
    """Rank 1 takes two activations of rank 0 for each other."""
    if engine.rank == 1:
        queue = list(engine._queues[0])
        first, second = [i for i, m in enumerate(queue) if m.key.payload == "activation"][1:3]
        queue[first], queue[second] = queue[second], queue[first]
        engine._queues[0] = tuple(queue)


def move_a_receive_ahead(engine):
    """Rank 1 posts its first receive of a gradient before the sends that stand before it for rank 2."""
    if engine.rank == 1:
        queue = list(engine._queues[2])
        gradient = next(i for i, m in enumerate(queue) if m.source == 2)
        queue.insert(0, queue.pop(gradient))
        engine._queues[2] = tuple(queue)


def do_not_connect(engine):
    engine._to_connect = ()


def connect_in_a_circle(engine):
    peers = list(connection_order(make_schedule("interleaved", 3, 6, 2).placement)[engine.rank])
    engine._to_connect = ((engine.rank + 1) % 3, (engine.rank + 2) % 3)
    assert sorted(peers) == sorted(engine._to_connect)


def forget_to_wait(engine):
    class Hasty(_Channel):
        def take(self, key):
            self._post(self._cursor.need(key))
            _, tensor = self._received.pop(key)
            self._post(self._cursor.taken(key))
            return tensor

    engine_module._Channel = Hasty


def reuse_a_buffer(engine):
    class Reusing(_Channel):
        def put(self, key, tensor):
            super().put(key, tensor)
            tensor.zero_()

    engine_module._Channel = Reusing


MUTATIONS = {
    exchange_two_messages: (
        "interleaved",
        r"rank 1: the receive from rank 0 of the activation of microbatch 2 for stage 1, posted in .*, is number \d+ "
        r"of its queue with rank 0 .*, for which that is the send of the activation of microbatch 1 for stage 1",
    ),
    move_a_receive_ahead: (
        "interleaved",
        r"rank 2: the receive from rank 1 of the activation of microbatch 0 for stage 2, posted in .*, is number \d+ "
        r".*, for which that is the receive of the gradient of microbatch 0 for stage 4",
    ),
    do_not_connect: (
        "interleaved",
        r"rank 0, .*: the receive from rank 2 of the activation of microbatch 0 for stage 3 is the first there, and "
        r"its host waits for ever for rank 2",
    ),
    connect_in_a_circle: ("interleaved", r"rank 0, .*: .* rank 1.* waits for ever for rank 1"),
    forget_to_wait: (
        "1f1b",
        r"rank 1, action 1F0: Tensor.tolist on the default stream is reading from what receive from rank 0 of the "
        r"activation of microbatch 0 for stage 1 .* is writing to, and no event or wait orders the two",
    ),
    reuse_a_buffer: (
        "1f1b",
        r"rank 0, action 0F0: aten.zero_.default on the default stream is writing to what send to rank 1 of the "
        r"activation of microbatch 0 for stage 1 .* is reading from",
    ),
}


def run_mutated(case):
    mutate, name = case
    world = World.from_environment()
    with nccl_rank(world.rank, stuck_seconds=2):
        start_processes(world, CPU, timeout_seconds=20)
        schedule = make_schedule(name, 3, 6, 2 if name == "interleaved" else 1)
        engine = Engine(schedule, dist.group.WORLD, ToyStages(schedule))
        try:
            mutate(engine)
            engine.run()
            return "ran through"
        except Exception as error:
            return str(error).split("Exception raised from")[0]
        finally:
            engine_module._Channel = _Channel
            dist.destroy_process_group()


def test_what_nccl_does_not_forgive_names_rank_and_operation():
    cases = [(mutate, name) for mutate, (name, _) in MUTATIONS.items()]
    for (mutate, _), ranks in zip(cases, run_ranks(3, run_mutated, cases)):
        wanted = re.compile(MUTATIONS[mutate][1])
        assert any(wanted.search(text) for text in ranks), (mutate.__name__, ranks)


# -- memory of one stream that another uses ----------------------------------------------------------------------------


class TwoStreams(ToyStages):
    """Emits on a stream of its own, as the overlapped plan does, so that receives are posted there too."""

    def __init__(self, schedule):
        super().__init__(schedule)
        self.side = torch.cuda.Stream()

    def run(self, *tasks):
        def on_side(emit):
            def emitted(tensor):
                self.side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self.side):
                    emit(tensor + 0)

            return emitted

        with torch.cuda.stream(self.side):
            torch.ones(4)  # what any operation of that stream does: it takes memory
        super().run(*(task._replace(emit=on_side(task.emit)) for task in tasks))
        # Read once more, on the stream that computes, with nothing after it that the other stream waits for.
        assert all((tensor + 0).sum().ge(0) for _, tensor, _ in tasks if tensor is not None)


def run_two_streams(recorded):
    world = World.from_environment()
    with nccl_rank(world.rank, stuck_seconds=10):
        start_processes(world, CPU, timeout_seconds=20)
        before = engine_module.has_streams
        try:
            if not recorded:
                engine_module.has_streams = lambda device: False
            schedule = make_schedule("1f1b", 3, 6)
            Engine(schedule, dist.group.WORLD, TwoStreams(schedule)).run()
            return "ran through"
        except Exception as error:
            return str(error).split("Exception raised from")[0]
        finally:
            engine_module.has_streams = before
            dist.destroy_process_group()


def test_what_an_action_takes_is_recorded_for_the_stream_that_uses_it():
    recorded, bare = run_ranks(3, run_two_streams, [True, False])
    assert recorded == ["ran through"] * 3
    wanted = (
        r"rank 1, action .*: aten.* takes memory on stream \d+ that was let go while the default stream may still run"
    )
    assert any(re.search(wanted, text) for text in bare), bare


# -- the watchdog, where the host runs ahead ---------------------------------------------------------------------------


class BlindStages(ToyStages):
    """Toy stages that read nothing, so that their host never stands."""

    def run(self, *tasks):
        for part, _, emit in tasks:
            if self.hang_at == str(part):
                time.sleep(self.hang_seconds)
            if part.stage != (self.schedule.stages - 1 if part.kind == "F" else 0):
                emit(torch.ones(4))

    def weight_gradient(self, action):
        pass

    def start_reduction(self, stage):
        pass


def run_watched(hanging_rank):
    world = World.from_environment()
    schedule = make_schedule("1f1b", 3, 5)
    with nccl_rank(world.rank, stuck_seconds=15):
        start_processes(world, CPU, timeout_seconds=30)
        Engine(
            schedule, dist.group.WORLD, BlindStages(schedule)
        )._connect()  # or the watchdog tells of that, on a busy CPU
        told, patience = [], 1.0 if hanging_rank is not None else 30.0
        watchdog = Watchdog(patience, rank=world.rank, world_size=3, store=process_group_store(), report=told.append)
        stages = BlindStages(schedule, hang_at="2B3" if world.rank == hanging_rank else None, hang_seconds=6.0)
        engine = Engine(schedule, dist.group.WORLD, stages, watchdog)
        try:
            before, steps = Event.alive, 1 if hanging_rank is not None else 8
            for _ in range(steps):
                engine.run()
                watchdog.enter("the end of the step")
                torch.cuda.synchronize()
                watchdog.leave()
            return told, Event.alive - before
        finally:
            watchdog.close()
            dist.destroy_process_group()


def test_the_watchdog_names_the_action_and_message_a_gpu_stands_at_though_the_host_ran_ahead():
    (hanging, calm) = run_ranks(3, run_watched, [2, None])
    reports = [text for told, _ in hanging for text in told]
    assert reports, "nobody told"
    lines = {int(line.split()[1].rstrip(":")): line for line in reports[-1].splitlines()[1:]}
    for rank, following in ((0, 1), (1, 2)):
        waits = rf"{rank}B3 \(stage {rank} microbatch 3\), waits for the gradient of microbatch 3 from pipeline rank"
        assert re.search(rf"{waits} {following}, on the GPU, while the host is in the end of the step", lines[rank])
    assert re.search(r"action 8 of 10: 2B3 \(stage 2 microbatch 3\), for \d+ s", lines[2]), lines[2]
    for told, events in calm:
        assert told == []
        # One follows each of ten actions, up to ten messages and what leaves at the end; eight steps share them.
        assert events <= 22
