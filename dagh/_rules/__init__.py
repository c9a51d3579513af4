"""One rule per operation; importing this package registers the built-in ones."""

from dagh._rules import (
    _average_pool,
    _bilinear,
    _binary,
    _conv,
    _elementwise,
    _extrema,
    _linear_maps,
    _losses,
    _normalize,
    _resampling,
    _robust,
    _select,
    _switches,
)
from dagh._rules._base import Call, KinkSites, Rule, Ties, has_rule, register_rule, registered, rule_for

__all__ = ["Call", "KinkSites", "Rule", "Ties", "has_rule", "register_rule", "registered", "rule_for"]
del _average_pool, _bilinear, _binary, _conv, _elementwise, _extrema, _linear_maps, _losses, _normalize, _resampling
del _robust, _select, _switches
