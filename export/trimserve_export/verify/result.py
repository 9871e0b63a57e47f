"""What a verification says: one `Check` a property, all of them in a `VerifyResult`."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Check:
    """One property of a trimmed folder, compared with the full model.

    Attributes:
        name: what was compared, e.g. ``"kept-logits"``.
        ok: it holds; None where nothing could be compared, which `detail` says.
        max_abs_diff: largest absolute difference that was seen; None where nothing numeric was compared.
        detail: what was compared and what was found, as one sentence.
    """

    name: str
    ok: bool | None
    max_abs_diff: float | None
    detail: str


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """The checks of a folder, in the order in which they ran."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """No check fails, and at least one holds."""
        return any(check.ok for check in self.checks) and not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that do not hold."""
        return tuple(check.name for check in self.checks if check.ok is False)

    @property
    def not_compared(self) -> tuple[str, ...]:
        """Names of the checks that had nothing to compare with."""
        return tuple(check.name for check in self.checks if check.ok is None)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: ``{ok, checks: [{name, ok, max_abs_diff, detail}]}``."""
        return {"ok": self.ok, "checks": [asdict(check) for check in self.checks]}
