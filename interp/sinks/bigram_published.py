"""Published figures of the Bigram-Backcopy toy, to be printed and drawn beside ours.

Guo et al. 2024, "Active-Dormant Attention Heads" (arXiv 2410.13835), sections 2 and 3; numbers read off the saved curves of their
repository (GuoTianYu2000/Active-Dormant-Attention). Preset "paper": width 256, length 256, batch 512, 10,000 steps, 3 triggers.
"""

SOURCE = "Guo et al. 2024, arXiv 2410.13835"

# One layer, AdamW: risks in nats, attention on ⟨s⟩ of non-triggers, ‖W_O v‖ of ⟨s⟩, Δlogit.
CURVE_COLUMNS = ("step", "backcopy_risk", "bigram_risk", "mass", "value_norm", "delta_logit")
CURVE = (
    (0, 4.296, 4.427, 0.0225, 5.20, -0.12),
    (140, 2.304, 2.324, 0.054, 9.14, 0.04),
    (400, 0.283, 2.247, 0.628, 5.03, 4.69),
    (1_000, 0.0075, 2.232, 0.779, 3.51, 9.70),
    (10_000, 8e-5, 2.229, 0.811, 1.42, 16.83),
)
# Δlogit = slope · ln(step) + intercept, from step 1,000 to 10,000.
LOGIT_SLOPE, LOGIT_INTERCEPT, LOGIT_R2 = 3.20, -12.7, 0.98
# Three layers, step 10,000: ‖x‖ at ⟨s⟩.
RESIDUAL_NORM = {"AdamW, softmax": 140.7, "SGD, softmax": 20.4, "AdamW, ReLU": 24.5}
# The trained one-layer model: (backcopy, bigram) risk with a part left out.
WITHOUT_ATTENTION, WITHOUT_MLP = (7.69, 2.2299), (3.17, 4.21)
# ‖W_O v‖ by token: ⟨s⟩, lowest and highest of triggers, of others.
VALUE_NORM_START, VALUE_NORM_TRIGGERS, VALUE_NORM_OTHERS = 0.5, (6.0, 7.0), (19.0, 27.0)
# ReLU attention: mass on ⟨s⟩ stays below this.
RELU_MASS = 1e-4
# Of the task at length 256.
TRIGGER_SHARE, ORACLE = 0.256, 2.226
