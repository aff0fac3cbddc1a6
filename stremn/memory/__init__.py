"""Slot memory: similarity (Eq. 1), selection (Eqs. 2-3), update (Eq. 4), read (Eq. 5), rules of forgetting, the bank around them."""
from typing import TYPE_CHECKING

from stremn import _doors

if TYPE_CHECKING:
    from .bank import (
        BankConfig as BankConfig, Decision as Decision, MemoryBank as MemoryBank,
        UpdatePolicy as UpdatePolicy,
    )
    from .coverage import coverage_rule as coverage_rule
    from .fusion import (
        FusionBank as FusionBank, FusionConfig as FusionConfig, with_fusion as with_fusion,
    )
    from .rules import (
        RULES as RULES, ZOO as ZOO, Comparison as Comparison, Matching as Matching,
        Request as Request, Rule as Rule, all_rules as all_rules, find_rule as find_rule,
        import_rule as import_rule,
    )
    from .select import gumbel_select as gumbel_select
    from .similarity import best_match_similarity as best_match_similarity
    from .update import Memory as Memory, Template as Template, append as append, write as write
    from .zoo import looks_at as looks_at, rule_table as rule_table
else:
    __getattr__, __dir__, __all__ = _doors(__name__, {
        "bank": "BankConfig Decision MemoryBank UpdatePolicy",
        "coverage": "coverage_rule",
        "fusion": "FusionBank FusionConfig with_fusion",
        "rules": "RULES ZOO Comparison Matching Request Rule all_rules find_rule import_rule",
        "select": "gumbel_select",
        "similarity": "best_match_similarity",
        "update": "Memory Template append write",
        "zoo": "looks_at rule_table",
    })
