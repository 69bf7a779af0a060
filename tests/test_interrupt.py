import os
import signal
import threading

import pytest

from knockon.interrupt import Ended, ended_by_sigterm, wishes


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_waits_and_a_second_does_not(number: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Ended) as ended, wishes() as wish:
        os.kill(os.getpid(), number)
        assert wish.number == number
        os.kill(os.getpid(), number)
        raise AssertionError
    assert ended.value.number == number
    assert signal.getsignal(number) == before


def test_sigterm_ends_work() -> None:
    with pytest.raises(KeyboardInterrupt), ended_by_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError


def test_another_thread_leaves_signals_alone() -> None:
    seen: list[int] = []

    def work() -> None:
        with wishes() as wish, ended_by_sigterm():
            seen.append(wish.number)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [0]
