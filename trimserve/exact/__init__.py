"""Exact mode: the proof that a drafted token is the full model's."""

from typing import TYPE_CHECKING

from trimserve.faces import lazy_face

if TYPE_CHECKING:
    from trimserve.exact.certificate import ColdCertificate as ColdCertificate
    from trimserve.exact.checker import Certificate as Certificate
    from trimserve.exact.checker import ExactChecker as ExactChecker

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "Certificate": "trimserve.exact.checker",
        "ColdCertificate": "trimserve.exact.certificate",
        "ExactChecker": "trimserve.exact.checker",
    },
)
