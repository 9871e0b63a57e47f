"""Prove a trimmed folder against the full model: `verify` runs every check that applies."""

from trimserve_export.verify.result import Check, VerifyResult
from trimserve_export.verify.runner import verify

__all__ = ["Check", "VerifyResult", "verify"]
