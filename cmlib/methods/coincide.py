"""Methods that become one another: at one end of a knob two names are one network. Data, for tables and tests; every row is proved."""

from __future__ import annotations

from typing import Any, NamedTuple


class Coincidence(NamedTuple):
    """``compress(net, key, **knobs)`` is the network of ``compress(net, other, **others)``, in every weight and output; ``limit`` says why.

    With the knobs ``away`` in addition it is not; None where every value of the knobs will do, before training.
    """

    key: str
    knobs: dict[str, Any]
    other: str
    others: dict[str, Any]
    limit: str
    away: dict[str, Any] | None


BWN = {"mode": "bwn"}  # of xnor_net: binary-weight network, mean |w| sign(w) of each filter
FLOAT = {"a_bits": 32}  # inputs as they are
HALF = {"keep": 0.5}

COINCIDENCES = (
    # pruning
    Coincidence("admm_weight_pruning", HALF, "magnitude_pruning_han", HALF, "before training Z is the nearest point of the set", None),
    Coincidence("learning_compression", HALF, "magnitude_pruning_han", HALF, "before training theta is the nearest point of the set", None),
    Coincidence("variational_dropout_lrt", HALF, "magnitude_pruning_han", HALF, "before training all are equally noisy, and the smallest go", None),
    Coincidence("l1_norm_filter_pruning", {}, "magnitude_pruning_han", {**HALF, "unit": "filter"}, "a filter's size is the sum of its weights'",
                {"p": 2}),
    Coincidence("group_wise_brain_damage", {"saliency": "norm"}, "admm_weight_pruning", {"keep": 0.3, "constraint": "shape"},
                "before training Z keeps the columns of largest norm", {"saliency": "obd"}),
    Coincidence("soft_filter_pruning", {**HALF, "p": 1}, "l1_norm_filter_pruning", HALF, "before training the filters of least norm go", {"p": 2}),
    Coincidence("network_slimming", HALF, "ista_channel_pruning", HALF, "both rank channels by |gamma|; what counts is how gamma got there", None),
    Coincidence("energy_aware_pruning", {**HALF, "restore": 0.0, "refit": "off"}, "magnitude_pruning_han", HALF, "nothing brought back or fitted",
                {"restore": 0.3}),
    # one bit
    Coincidence("loss_aware_binarization", {"curvature": "ones", "per": "filter"}, "xnor_net", BWN, "a loss that is flat alike in all weights",
                {"curvature": "hess_diag"}),
    Coincidence("network_sketching", {"m_bases": 1}, "xnor_net", BWN, "a sketch of one sign", {"m_bases": 2}),
    Coincidence("lq_nets", {"bits": 1, **FLOAT}, "xnor_net", BWN, "a basis of one number", {"bits": 2}),
    Coincidence("ternary_weight_networks", {"delta_factor": 0.0, "per": "filter"}, "xnor_net", BWN, "a threshold of 0 leaves no weight out",
                {"delta_factor": 0.7}),
    Coincidence("hwgq", FLOAT, "xnor_net", BWN, "inputs as they are", {"a_bits": 2}),
    Coincidence("horq", {"order_K": 1}, "xnor_net", {}, "a residual sum of one sign", {"order_K": 2}),
    Coincidence("binaryconnect", {"lr_scale_by_init": "off"}, "few_multiplications", {"connect": "binary", "lr_scale_by_init": "off"},
                "the likelier of -1 and +1", None),
    Coincidence("single_bit_wrn", {"scale": "mean_abs"}, "dorefa_net", FLOAT, "one scale a layer, mean |w|", {"scale": "he_std"}),
    Coincidence("bi_real_net", {}, "xnor_net", {"use_K_map": "off"}, "they differ in their gradients alone", {"magnitude_aware": "off"}),
    Coincidence("bi_real_net", {"magnitude_aware": "off"}, "bnn", {}, "they differ in their gradients alone", {"magnitude_aware": "on"}),
    Coincidence("admm_low_bit", {"code_set": "{+-1}"}, "dorefa_net", FLOAT, "before training, the nearest alpha times a sign",
                {"code_set": "{0,+-1}"}),
    Coincidence("elq", {"code_set": "binary"}, "dorefa_net", FLOAT, "all weights rounded at once", {"portion": 0.5}),
    # few levels
    Coincidence("elq", {}, "ternary_weight_networks", {}, "all weights rounded at once", {"portion": 0.5}),
    Coincidence("slq", {"bits": 4}, "vq_gong", {"k": 16}, "all clusters rounded at once", {"portion": 0.5}),
    Coincidence("mlq", {"bits": 3}, "slq", {"bits": 3}, "all layers rounded at once", {"depth": 0.5}),
    Coincidence("hessian_weighted_kmeans", {"hessian_source": "ones"}, "vq_gong", {"k": 16}, "a loss that is flat alike in all weights",
                {"hessian_source": "exact_diag"}),
    Coincidence("scalable_8bit_training", {}, "integer_only_quantization", {}, "they differ in their gradients alone", {"bits": 4}),
    Coincidence("value_aware_quantization", {"large_ratio_percent": 0.0, "low_bits": 3}, "integer_only_quantization", {"bits": 3, **FLOAT},
                "no weight is kept as it is", {"large_ratio_percent": 5.0}),
    Coincidence("two_step_quantization", {"w_levels": "float", "activation_sparsity": 0.5}, "hwgq", {"binarize_weights": "off"},
                "half of the inputs become 0", {"activation_sparsity": 0.75}),
)  # fmt: skip
