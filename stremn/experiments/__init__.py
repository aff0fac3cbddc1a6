"""What is measured: rows, records, tables, claims and costs."""
from typing import TYPE_CHECKING

from stremn import _doors

if TYPE_CHECKING:
    from .benchmark import bench as bench
    from .claims import claims_table as claims_table, reproduce as reproduce
    from .diagnose import (
        cached_templates as cached_templates, diagnose_clip as diagnose_clip, diagnosis_report as diagnosis_report,
        modes_known as modes_known, regret as regret, return_hits as return_hits, simulate as simulate,
    )
    from .grid import Row as Row, run as run, up_to_date as up_to_date
    from .levels import bench_levels as bench_levels
    from .measure import (
        ChameleonEval as ChameleonEval, PredictionEval as PredictionEval, VideoEval as VideoEval,
        evaluate_chameleon as evaluate_chameleon, evaluate_videos as evaluate_videos,
        measure_prediction as measure_prediction,
    )
else:
    __getattr__, __dir__, __all__ = _doors(__name__, {
        "benchmark": "bench",
        "claims": "claims_table reproduce",
        "diagnose": "cached_templates diagnose_clip diagnosis_report modes_known regret return_hits simulate",
        "grid": "Row run up_to_date",
        "levels": "bench_levels",
        "measure": "ChameleonEval PredictionEval VideoEval evaluate_chameleon evaluate_videos measure_prediction",
    })
