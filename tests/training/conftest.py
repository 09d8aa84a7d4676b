from collections.abc import Callable, Iterator

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture
def fresh_accelerate() -> Iterator[Callable[[], None]]:
    """Lets a test choose its mixed precision, again when called: accelerate keeps one for the whole process."""

    def forget() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)

    forget()
    yield forget
    forget()
