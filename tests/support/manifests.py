"""Where manifests, configurations and schemas lie."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
CONFIGS = ROOT / "configs"
SHARED = Path(os.environ.get("SEGPROP_SHARED") or Path(__file__).resolve().parents[3] / "shared")
CRDS = SHARED / "kuberay"
