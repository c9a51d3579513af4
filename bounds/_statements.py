"""The statements behind the rows of a report: where they come from, what they say, and whether they are true."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Origin = Literal["printed", "corrected", "ours"]
Needs = Literal["weights", "data", "exact"]
Part = Literal["H_O", "H_F", "H"]

PAPER = "ConvNets Landscape Convergence: Hessian-Based Analysis of Matricized Networks"


@dataclass(frozen=True)
class Statement:
    """One statement: ``verdict`` says whether it is valid, and the counterexample where it is not.

    Architecture plug-ins of other packages attach statements of their own to a match, with ``bound``: from the
    evaluated graph (:class:`dagh.State`) and the match it makes the natural logarithm of an upper bound on the norm
    that ``part`` names, or raises an exception that says why there is none.
    """

    id: str
    name: str
    source: str
    verdict: str
    text: str
    needs: Needs = "weights"
    origin: Origin = "ours"
    part: Part = "H_O"
    bound: Callable[[Any, Any], float] | None = None


def _paper(where: str) -> str:
    return f"{PAPER}, {where}"


_ALL = (
    Statement(
        "P.L1", "Lemma 1", _paper("Lemma 1"),
        "valid; G_p must include Λ_p, and the last line of the appendix has factors of shapes that do not match",
        "H_O = Qᵀ Fᵀ A F Q", "data", "printed",
    ),
    Statement(
        "P.L2", "Lemma 2", _paper("Lemma 2"),
        "valid, loose by 2√2 for cross-entropy; with the misprinted factor w_T² L it is false (1-1-1-1, w = 3: "
        "243 > 76.4); false for sums of squares (A = 2I: 4 > 2.83)",
        "‖H_O‖ ≤ √2 q² ‖x‖² (L+1) w_T^{2L}", "weights", "printed",
    ),
    Statement(
        "P.T1", "Theorem 1", _paper("Theorem 1"),
        "valid if C ≥ C_0 too (C_0 = 100, C = 2: 50.5 > 11.3), loose: ‖Q‖ = √d, not d",
        "1D: ‖H_O‖ ≤ √2 ‖x‖² d² (L+1) (C²w²kd)^L", "weights", "printed",
    ),
    Statement(
        "P.T2", "Theorem 2", _paper("Theorem 2"),
        "valid if C ≥ C_0 too, loose: ‖Q‖² = mn, C²k² times less than the ‖Q‖_F² used",
        "2D: ‖H_O‖ ≤ √2 ‖x‖² C²k²mn (L+1) (C²k²w²mn)^L", "weights", "printed",
    ),
    Statement(
        "P.L3", "Lemma 3", _paper("Lemma 3"),
        "valid for windows that do not overlap, though its proof is not; false with overlap (kernel 5, stride 1: "
        "8 > 5.87)",
        "max-pooling at l: Theorem 2 times k_pool^{-2(L-l+2)}", "weights", "printed",
    ),
    Statement(
        "P.L4", "Lemma 4", _paper("Lemma 4"),
        "valid for windows that do not overlap, though its proof is not (two errors cancel)",
        "average pooling at l: Theorem 2 times k_pool^{-2(L-l+2)}", "weights", "printed",
    ),
    Statement(
        "P.L5", "Lemma 5", _paper("Lemma 5"),
        "invalid: a ratio is upside down (one 1×1 convolution, head 1 → 2 with weights ±0.01: 0.50005 > 0.000566)",
        "linear head: ‖H_O‖ ≤ √2 ‖x‖² q² (h²w̃²)^P B^L (L+1 + P h²w̃²/B)", "weights", "printed",
    ),
    Statement(
        "P0", "as printed", _paper("Theorems 1–2, Lemmas 3–5, taken together"),
        "not a bound with a linear head (Lemma 5); the combination of cases is not in the paper",
        "the printed statements combined", "weights", "printed",
    ),
    Statement(
        "P.C1", "Corollary 1", _paper("Corollary 1"),
        "not a theorem: derived from ≈; false if W_l bounds the losses at θ* only; constants 2 and 4 times too large "
        "if "
        "it bounds them on the ball, where the first term alone suffices",
        "|L_{k+1} − L_k| ≤ 2W_l/(k+1) + 2R² B/(k+1), B by Theorem 1", "weights", "printed", "H",
    ),
    Statement(
        "P.C2", "Corollary 2", _paper("Corollary 2"), "as Corollary 1",
        "|L_{k+1} − L_k| ≤ 2W_l/(k+1) + 2R² B/(k+1), B by Theorem 2", "weights", "printed", "H",
    ),
    Statement(
        "C.L2", "Lemma 2, corrected", _paper("Lemma 2"), "valid; sharp for cross-entropy",
        "‖H_O‖ ≤ a q² ‖x‖² (L+1) w_T^{2L}, a = sup ‖A‖ (1/2 for cross-entropy)", "weights", "corrected",
    ),
    Statement(
        "C.T1", "Theorem 1, corrected", _paper("Theorem 1"), "valid, attained",
        "1D: ‖H_O‖ ≤ a ‖x‖² d (L+1) (C²w²kd)^L, C ≥ C_0 too", "weights", "corrected",
    ),
    Statement(
        "C.T2", "Theorem 2, corrected", _paper("Theorem 2"), "valid, attained",
        "2D: ‖H_O‖ ≤ a ‖x‖² mn (L+1) (C²k²w²mn)^L, C ≥ C_0 too", "weights", "corrected",
    ),
    Statement(
        "C.L3", "Lemma 3, corrected", _paper("Lemma 3"),
        "valid for windows that do not overlap; exponent sharp for l = 1",
        "max-pooling at l: corrected Theorem 2 times k_pool^{-2(L-l+2)}", "weights", "corrected",
    ),
    Statement(
        "C.L4", "Lemma 4, corrected", _paper("Lemma 4"), "valid for windows that do not overlap",
        "average pooling at l: corrected Theorem 2 times k_pool^{-2(L-l+2)}", "weights", "corrected",
    ),
    Statement(
        "C.L5", "Lemma 5, corrected", _paper("Lemma 5"), "valid; h bounds the flattened width too",
        "‖H_O‖ ≤ a ‖x‖² mn (h²w̃²)^P B^L (L+1 + P B/(h²w̃²)), B = C²k²w²mn", "weights", "corrected",
    ),
    Statement(
        "P1", "corrected", _paper("Theorems 1–2, Lemmas 3–5, corrected and taken together"), "valid",
        "the corrected statements combined", "weights", "corrected",
    ),
    Statement(
        "C.C1", "Corollaries, corrected", _paper("Corollaries 1 and 2"),
        "holds where the quadratic model with H_O does",
        "|L_{k+1} − L_k| ≤ W_l/(k+1) + R² B/(2(k+1))", "weights", "corrected", "H",
    ),
    Statement(
        "a1", "Frobenius norms", "ours", "valid",
        "a X² Σ_p r_p Π_{i≠p} ‖T_i‖_F² π_i²; sums over paths and uses where the graph branches",
    ),
    Statement(
        "a2", "patch norms", "ours", "valid",
        "a X² Σ_p κ̃_p Π_{i≠p} min(κ_i ‖W_i‖₂², ‖T_i‖_F²) π_i², κ̃ = min(r, κ)",
    ),
    Statement(
        "a3", "layer norms", "ours", "valid; the best one from weights alone where a5 is not for the network",
        "a X² Σ_p κ̃_p Π_{i≠p} ‖T_i‖² π_i², rigorous ‖T_i‖; for cross-entropy ½ max_ij ‖t_i − t_j‖², rows of T_N, "
        "for ‖T_N‖²",
    ),
    Statement(
        "a4", "averaged activations", "ours, after Combettes and Pesquet (2020)",
        "valid for chains of activations with slopes in [0, 1]",
        "a3 with ‖T_q D … D T_p‖ ≤ 2^{p-q} Σ over cuts of Π ‖T_b … T_a‖",
    ),
    Statement(
        "a5", "multipliers", "ours, after Fazlyab et al. (2019)",
        "valid for chains of activations with slopes in [0, 1] and disjoint max-pooling; at most a3 of exact norms",
        "a3 with ‖T_q D … D T_p‖² ≤ λ_max(M_p), M_p = T_pᵀ Λ (2Λ − M_{p+1})⁻¹ Λ T_p, any diagonal 2Λ ≻ M_{p+1}",
    ),
    Statement(
        "b0", "inputs at x", "ours", "valid",
        "a Σ_p (Π_{i>p} ‖T_i‖² π_i²) ‖U_p‖², U_p the unfolded input", "data",
    ),
    Statement(
        "b1", "masked layers at x", "ours", "valid",
        "Σ_p ‖D_p‖² Π_{p<i<N} ‖D_i T_i‖² ‖Sᵀ T_N‖² ‖U_p‖², S Sᵀ = A", "data",
    ),
    Statement(
        "b2", "true gains at x", "ours", "valid for every graph",
        "Σ_p ‖Sᵀ G_p‖² ‖U_p‖², S Sᵀ = A, G_p = ∂z/∂z_p", "data",
    ),
    Statement(
        "b3", "layer blocks", "ours", "valid for every graph",
        "Σ_p ‖Sᵀ J_p‖²; at most the number of layers times ‖H_O‖", "data",
    ),
    Statement(
        "b3.mean", "samples one by one", "ours", "valid",
        "mean over samples of ‖H_O(x_n)‖", "exact",
    ),
    Statement(
        "b3.block", "samples in pairs", "ours", "valid",
        "λ_max of the matrix of ‖S_iᵀ J_i J_jᵀ S_j‖ / N", "exact",
    ),
    Statement(
        "c", "exact", "ours", "exact",
        "‖H_O‖ = λ_max(Σ_p Sᵀ J_p J_pᵀ S), through the Gram matrix", "exact",
    ),
    Statement(
        "F_a", "functional part, weights", "ours", "valid",
        "λ_max(N), N_pq = sup‖g‖ X √(κ̃_p κ̃_q) Π_{i≠p,q} ‖T_i‖ π_i", "weights", part="H_F",
    ),
    Statement(
        "F_b", "functional part, data", "ours", "valid",
        "λ_max(N), N_pq = ‖Y_q(b_q)‖ ‖S_{p→q}‖ ‖U_p‖, b_q = G_qᵀ g", "data", part="H_F",
    ),
    Statement(
        "F_exact", "functional part", "ours", "exact",
        "‖H_F‖ by eigenvalues", "exact", part="H_F",
    ),
    Statement(
        "H.a3", "a3 + F_a", "ours", "valid",
        "‖H‖ ≤ ‖H_O‖ + ‖H_F‖", "weights", part="H",
    ),
    Statement(
        "H.b2", "b2 + F_b", "ours", "valid",
        "‖H‖ ≤ ‖H_O‖ + ‖H_F‖", "data", part="H",
    ),
    Statement(
        "H.c", "c + F_b", "ours", "valid",
        "‖H‖ ≤ ‖H_O‖ + ‖H_F‖", "exact", part="H",
    ),
    Statement(
        "H.exact", "Hessian", "ours", "exact",
        "‖H‖ by eigenvalues", "exact", part="H",
    ),
    *(
        Statement(
            f"{name}.ball", f"{title}, ball", "ours", "valid",
            f"{name} for all parameters within R: ‖T_i‖ + √κ̃_i R", "weights",
            part=part,  # type: ignore[arg-type]
        )
        for name, title, part in (
            ("a1", "Frobenius norms", "H_O"), ("a2", "patch norms", "H_O"), ("a3", "layer norms", "H_O"),
            ("F_a", "functional part", "H_F"), ("H.a3", "a3 + F_a", "H"),
        )
    ),
)  # fmt: skip


class _Statements(Mapping[str, Statement]):
    """Statements by id, in the order of a report."""

    def __init__(self, statements: tuple[Statement, ...]) -> None:
        self._by_id = {s.id: s for s in statements}

    def __getitem__(self, key: str) -> Statement:
        return self._by_id[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_id)

    def __len__(self) -> int:
        return len(self._by_id)


#: Every statement by id.
STATEMENTS: Mapping[str, Statement] = _Statements(_ALL)
