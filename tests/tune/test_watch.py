"""How signals end a search: the second one at once, with its own number."""

from __future__ import annotations

import signal

import pytest

from raymeta import cli
from raymeta.tune.watch import Signals

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_second_signal_gives_its_own_exit_code(second: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[int] = []
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    @cli.commands.command("search-twice", hidden=True)
    def search_twice() -> None:
        with Signals() as signals:
            signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))  # as Ray Tune does
            signal.raise_signal(signal.SIGINT)
            assert (signals.number, heard) == (signal.SIGINT, [signal.SIGUSR1])
            signal.raise_signal(second)
            raise AssertionError("it was waited for")

    try:
        assert cli.run(["search-twice"]) == 128 + second
    finally:
        del cli.commands.commands["search-twice"]
    assert "interrupted" in capsys.readouterr().err
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_before_ray_tune_listens_ends_it_at_once(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt) as caught, Signals():
        signal.raise_signal(number)
    assert getattr(caught.value, "number", None) == number


def test_an_error_of_the_search_is_its_own() -> None:
    with pytest.raises(ZeroDivisionError), Signals():
        raise ZeroDivisionError
