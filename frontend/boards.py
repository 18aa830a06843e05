"""The busy thresholds of all namespaces of a frontend, as one board."""

from collections.abc import Callable, Collection

from frontend.busy_threshold import Setting, ThresholdBoard
from router.busy import Thresholds


class Boards(ThresholdBoard):
    """A `ThresholdBoard` over others.

    A change goes to every namespace that knows the model then, one after another; what stands is
    told by the first that has something set. A namespace that gets the model later has its own.
    """

    def __init__(self, boards: Callable[[], Collection[ThresholdBoard]]) -> None:
        """boards: of the namespaces that there are now."""
        self._boards = boards

    def models(self) -> list[str]:
        return sorted({model for board in self._boards() for model in board.models()})

    def get(self, model: str) -> Setting | None:
        settings = (board.get(model) for board in self._boards())
        return next((setting for setting in settings if setting is not None), None)

    async def change(self, model: str, new: Thresholds, source: str) -> int:
        """The position is that in the last of the logs."""
        seq = 0
        for board in self._boards():
            if model in board.models():
                seq = await board.change(model, new, source)
        return seq
