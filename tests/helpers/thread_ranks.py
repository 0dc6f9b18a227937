"""Ranks that are threads of one process: hundreds of cases without a launch."""

import threading

import numpy as np

MOST_SECONDS = 60  # for a rank to wait for the others: a rank that hangs fails the test


class ThreadRanks:
    """One rank among several threads."""

    def __init__(self, rank, size, barrier, board):
        self.rank, self.size, self._barrier, self._board = rank, size, barrier, board
        self.messages = []  # how many numbers each had
        self.sent = 0  # bytes to other ranks, of what is exchanged and spread

    def gather(self, row):
        self.messages.append(row.size)
        return np.stack(self._shared(row.copy()))

    def exchange(self, send, send_counts, receive, receive_counts):
        assert sum(send_counts) == send.size
        assert sum(receive_counts) == receive.size
        self.sent += send.size - send_counts[self.rank]
        parts = self._shared(np.split(send.copy(), np.cumsum(send_counts[:-1])))
        own = [part[self.rank] for part in parts]
        assert [part.size for part in own] == list(receive_counts)
        receive[:] = np.concatenate(own)

    def spread(self, parts):
        self.sent += sum(each.size for each in parts[self.rank]) * (self.size - 1)
        found = self._shared([each.copy() for each in parts[self.rank]])
        for own, there in zip(parts, found, strict=True):
            for target, source in zip(own, there, strict=True):
                assert target.size == source.size
                target[:] = source

    def _shared(self, value):
        self._board[self.rank] = value
        self._barrier.wait(MOST_SECONDS)
        values = list(self._board)
        self._barrier.wait(MOST_SECONDS)  # nobody writes the next one before all have read these
        return values


def on_ranks(size, work):
    """What `work(ranks)` returns or raises on each rank."""
    barrier, board, found = threading.Barrier(size), [None] * size, [None] * size

    def run(rank):
        try:
            found[rank] = work(ThreadRanks(rank, size, barrier, board))
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * MOST_SECONDS)
    assert not any(thread.is_alive() for thread in threads)
    errors = [each for each in found if isinstance(each, BaseException)]
    own = [each for each in errors if not isinstance(each, threading.BrokenBarrierError)]
    if len(own) < len(errors):  # some have waited in vain
        raise own[0] if own else errors[0]
    return found


def together(size, work):
    """What `work(ranks)` returns on each rank, none of which may raise."""
    found = on_ranks(size, work)
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return found
