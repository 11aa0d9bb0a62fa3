"""What a study will need, and what a search would refuse, before it runs: `evomerge check`."""

from evomerge.searching.preflight.findings import PreflightFinding
from evomerge.searching.preflight.study_check import check_study

__all__ = ["PreflightFinding", "check_study"]
