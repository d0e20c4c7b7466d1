"""Processes that wait for each other: who is gone, failed or stands still is named in time.

A process that waits in a collective operation learns nothing of the others: gloo says that a
connection broke, NCCL nothing, and both wait for minutes. So each process has two threads. One
tells the others of it through a store of torch in the first process, and hears of them; the other
judges, and ends its process when that cannot go on. No device is asked for anything.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import FrameType

from mmengine.dist import barrier, broadcast_object_list, get_dist_info
from mmengine.logging import MMLogger
from torch.distributed import TCPStore

TIMEOUT = 600.0  # seconds, `env_cfg.dist_cfg.timeout`
RESERVE = 60.0  # so much later torch's own limit comes, if one has to
BEATS = 200  # signs of each process in that time
SILENT, SHORT = 20, 5  # missed signs of one that is gone; where an operation has failed already
# of operations that fail because another process did
COLLECTIVES = ('gloo', 'nccl', 'processgroup', 'connection closed', 'connection reset', 'tcpstore')
# files of torch in which a process waits; DDP reduces in the backward pass
WAITING = ('/torch/distributed/', '/torch/nn/parallel/distributed.py', '/torch/autograd/graph.py')
MEMORY = ('out of memory', 'MemoryError', "can't allocate memory")
REMEDIES = {
    'failed': 'Mend that, and start again with --resume',
    'memory': 'Take less: settings.batch_size (gathering keeps the batch of the recipe), '
    'model.backbone.with_cp=True; and start again with --resume',
    'silent': 'It was killed (by the kernel if memory ran out: `dmesg` says so; on Slurm by the '
    "job's limit) or stopped, or its machine or network is gone. Start again with --resume",
    'still': 'Look at what it does there (storage, a transform); env_cfg.dist_cfg.timeout=SECONDS '
    'waits longer. Start again with --resume',
}


@dataclass(frozen=True)
class Sign:
    """What a process tells the others.

    Args:
        name: Where it runs.
        beats: Number of the sign.
        points: Begins and ends of steps it has passed since its first one, which are the same
            in all processes.
        where: The last hook point.
        place: The line of Python at which its training is.
        waits: Whether it waits for the others there.
        failure: The error that ends it, if it has one of its own.
    """

    name: str
    beats: int = 0
    points: int = 0
    where: str = 'the first step'
    place: str = ''
    waits: bool = False
    failure: str = ''

    def __str__(self) -> str:
        seen = ', '.join(filter(None, [self.where, self.place]))
        return f'({self.name}; last seen in {seen})'


class Watch:
    """Watches over the other processes until it is stopped.

    Args:
        timeout: Seconds after which a run ends in which nobody gets on: no process begins or ends a
            step or comes to another line of Python. Who gives no sign is missed after a tenth.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.beat = timeout / BEATS  # seconds
        self.rank, size = get_dist_info()
        self.others = [rank for rank in range(size) if rank != self.rank]
        self.watched = threading.get_ident()
        self.name = f'process {os.getpid()} on {socket.gethostname()}'
        self.beats = self.points = 0
        self.where = Sign.where
        self.failure = ''
        self.raising = False  # the watched thread ends by itself
        self.stopped, self.woken = threading.Event(), threading.Event()
        self.keys = [str(rank) for rank in range(size)]
        self.store = _open_store(self.rank)
        self._tell()
        barrier()
        self.heard = self._hear()
        self.missed = [0] * size  # signs of each process
        self.still = self.failing = 0  # for so many signs
        for loop in (self._exchange, self._judge):
            threading.Thread(target=loop, daemon=True).start()

    def pass_point(self, name: str, iteration: int) -> None:
        """Note that the training has come to a hook point."""
        if name.endswith('_iter') and (self.points or name.startswith('after')):
            self.points += 1  # from the first step on, which may be compiled for long
        self.where = f'{name}, iteration {iteration + 1}'

    def _tell(self) -> None:
        frame = None if self.failure else sys._current_frames().get(self.watched)
        self.beats += 1
        sign = Sign(
            *(self.name, self.beats, self.points, self.where),
            place=_describe(frame),
            waits=frame is not None and any(part in frame.f_code.co_filename for part in WAITING),
            failure=self.failure,
        )
        self.store.set(str(self.rank), json.dumps(asdict(sign)))

    def _hear(self) -> list[Sign]:
        return [Sign(**json.loads(sign)) for sign in self.store.multi_get(self.keys)]

    def _exchange(self) -> None:
        """Tell and hear; this ends, or waits for ever, with the first process and its store."""
        try:
            while not self.stopped.is_set():
                self.woken.clear()
                self._tell()
                self.heard = self._hear()
                self.woken.wait(self.beat)
        except RuntimeError:
            return  # of which the other thread sees the silence

    def _judge(self) -> None:
        """End the process when another has failed, is gone, or nobody gets on.

        Time is counted in looks, so that a process that was stopped itself accuses nobody.
        """
        before = self.heard
        while not self.stopped.wait(self.beat):
            heard = self.heard
            pairs = list(zip(before, heard, strict=True))
            for rank, (old, new) in enumerate(pairs):
                self.missed[rank] = 0 if new.beats != old.beats else self.missed[rank] + 1
            same = all((old.points, old.place) == (new.points, new.place) for old, new in pairs)
            self.still = self.still + 1 if same and all(sign.points for sign in heard) else 0
            self.failing += any(heard[rank].failure for rank in self.others)
            before = heard
            late = self.failing > SHORT or not any(sign.failure for sign in heard)
            if not self.raising and late and (fault := self.find_fault()):
                self._end(fault)

    def find_fault(self, missed: int = SILENT) -> str:
        """Say which other process is the reason that this one cannot go on, if one is.

        Args:
            missed: After so many signs that did not come a process is gone.
        """
        heard = self.heard
        for rank in self.others:
            if failure := heard[rank].failure:
                remedy = 'memory' if any(sign in failure for sign in MEMORY) else 'failed'
                return f'rank {rank} failed {heard[rank]}: {failure}. {REMEDIES[remedy]}'
        if self.rank and self.missed[self.rank] >= missed:
            gone = [0]  # not even what this process told comes back
        else:
            gone = [rank for rank in self.others if self.missed[rank] >= missed]
        if gone:
            return f'no sign of life of {_list(gone, heard)}. {REMEDIES["silent"]}'
        return self._find_still() if self.still >= BEATS else ''

    def _find_still(self) -> str:
        who = _list(find_last(self.heard), self.heard)
        text = f'nobody has got on for {self.timeout:g} s; the others wait for {who}'
        return f'{text}. {REMEDIES["still"]}'

    def _end(self, fault: str) -> None:
        """End the process, whose watched thread may never return from where it is."""
        text = f'rank {self.rank} ends: {fault}'
        if self.still >= BEATS and self.rank in find_last(self.heard):
            frame = sys._current_frames().get(self.watched)
            text = f'{"".join(traceback.format_stack(frame))}{text}'
        print(text, file=sys.stderr, flush=True)
        logger = MMLogger.get_current_instance()
        log = threading.Thread(target=logger.error, args=(text,), daemon=True)
        log.start()
        log.join(SHORT)  # seconds: storage may be what hangs
        os._exit(1)

    def explain(self, error: Exception) -> str:
        """Tell the others of an error, or say which of them is the reason of it, if one is."""
        self.raising = True
        told = f'{type(error).__name__}: {error}'
        if any(sign in told.lower() for sign in COLLECTIVES):
            self._wait(2 * SHORT, lambda: bool(self.find_fault(SHORT)))
            fault = self.find_fault(SHORT)
            if not fault and 'timed out' in told.lower():  # by one that runs, but in circles
                fault = self._find_still()
            if fault:
                return f'rank {self.rank} ends: {fault}'
        self.failure = told[:1000]
        self.woken.set()
        self._wait(2, self._is_told)
        return ''

    def _is_told(self) -> bool:
        ranks = [self.rank] if self.rank else [0, *self.others]  # the store ends with the first
        return all(self.heard[rank].failure for rank in ranks)

    def _wait(self, beats: int, done: Callable[[], bool]) -> None:
        end = time.monotonic() + beats * self.beat
        while not done() and time.monotonic() < end:
            time.sleep(self.beat / 10)

    def stop(self) -> None:
        """Watch no longer."""
        self.stopped.set()
        self.woken.set()


def _open_store(rank: int) -> TCPStore:
    host = os.environ.get('MASTER_ADDR', 'localhost')  # where the first process runs
    port = [0]
    if rank == 0:
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        port = [store.port]
    broadcast_object_list(port)
    return store if rank == 0 else TCPStore(host, port[0], wait_for_workers=False)


def _describe(frame: FrameType | None) -> str:
    return f'{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}' if frame else ''


def find_last(signs: list[Sign]) -> list[int]:
    """Ranks of the processes that the others wait for, as far as can be seen."""
    points = min(sign.points for sign in signs)
    last = [rank for rank, sign in enumerate(signs) if sign.points == points]
    return [rank for rank in last if not signs[rank].waits] or last


def _list(ranks: list[int], signs: list[Sign]) -> str:
    return ', '.join(f'rank {rank} {signs[rank]}' for rank in ranks)


@contextmanager
def watched(timeout: float) -> Iterator[Watch | None]:
    """Watch over the other processes, if there are any.

    Raises:
        RuntimeError: If an operation with the others failed; it names the process that is to blame.
    """
    if get_dist_info()[1] == 1:
        yield None
        return
    watch = Watch(timeout)
    try:
        yield watch
        barrier()  # the first process has the store
    except Exception as error:
        if fault := watch.explain(error):
            MMLogger.get_current_instance().error(fault)
            raise RuntimeError(fault) from error
        raise
    finally:
        watch.stop()
