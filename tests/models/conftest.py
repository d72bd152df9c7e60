from __future__ import annotations

from distributions import distributions as distributions
