"""What one request's runs are bound to: where their inputs are, and where their outputs go."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from trimserve.runtime.session import Session

if TYPE_CHECKING:
    import onnxruntime as ort


class Bound:
    """The IoBinding of one cache.

    A binding holds what the last run was given, so two requests with one binding would read and write each
    other's buffers: each cache has its own. What stays bound from step to step, as shared buffers do, is
    bound once.
    """

    def __init__(self) -> None:
        self._binding: ort.IOBinding | None = None
        self._opened = 0
        self._inputs: dict[str, ort.OrtValue] = {}
        self._buffers: dict[str, ort.OrtValue] = {}

    def run(
        self,
        session: Session,
        inputs: "Mapping[str, ort.OrtValue]",
        buffers: "Mapping[str, ort.OrtValue]",
        places: Mapping[str, str],
    ) -> "Sequence[ort.OrtValue]":
        """Run a session, always the same one.

        Args:
            session: the session.
            inputs: every input.
            buffers: outputs that are written where they are.
            places: the device of every other output; in this order they are returned.
        """
        binding = self._bind(session)
        for name, value in inputs.items():
            if self._inputs.get(name) is not value:
                binding.bind_ortvalue_input(name, value)
                self._inputs[name] = value
        # Always anew: what the last run made would be written over.
        for name, device in places.items():
            binding.bind_output(name, device)
        for name, value in buffers.items():
            if self._buffers.get(name) is not value:
                binding.bind_ortvalue_output(name, value)
                self._buffers[name] = value
        session.run_with_iobinding(binding)
        made: Sequence[ort.OrtValue] = binding.get_outputs()[: len(places)]
        return made

    def _bind(self, session: Session) -> "ort.IOBinding":
        # In a forked child the session is another one.
        if self._binding is None or self._opened != session.opened:
            self._opened = session.opened
            self._binding = session.io_binding()
            self._inputs, self._buffers = {}, {}
        return self._binding
