"""Settings of a GRPO run: TRL's names and meanings, Med-R1's defaults, and only fields that work."""

from dataclasses import dataclass

from engine.command.settings import refuse, setting
from engine.rollout.sampling import SamplingParams
from engine.training.config.training import PolicyConfig
from kernels.grpo_terms import LOSS_TYPES, GRPOLoss


@dataclass
class GRPOConfig(PolicyConfig):
    """GRPO: sampling, rewards and loss.

    `transformers.TrainingArguments` and what GRPO adds, under TRL's names.
    One unit differs from TRL: `per_device_train_batch_size` counts prompts, as in the papers' code, not answers.
    """

    # Med-R1's script, where it differs from the defaults of all trainers.
    learning_rate: float = setting(1e-6, "Peak learning rate.")
    per_device_train_batch_size: int = setting(
        1, "Prompts (not answers) per process and forward pass; each has num_generations answers."
    )
    gradient_accumulation_steps: int = setting(2, "Forward passes per optimizer step; their answers are sampled together.")
    bf16: bool | None = setting(False, "Mixed precision. None: where there is a GPU.")  # type: ignore[assignment]

    # Sampling
    num_generations: int = setting(4, "G: answers sampled per prompt; advantages compare answers of one prompt.", at_least=2)
    temperature: float = setting(
        1.0,
        "Sampling temperature; log-probabilities are scored at the same temperature.",
        more_than=0,
    )
    top_p: float = setting(1.0, "Nucleus sampling: smallest set of tokens with this probability mass.", more_than=0, at_most=1)
    top_k: int = setting(0, "Sample among the k most likely tokens; 0: all.", at_least=0)
    min_p: float | None = setting(None, "Drop tokens less likely than min_p times the most likely one.", at_least=0, at_most=1)
    repetition_penalty: float = setting(1.0, "Penalise tokens of the prompt and of the answer so far; 1: off.", more_than=0)
    rollout_batch_size: int | None = setting(
        None, "Prompts sampled at once; lower it if the cache does not fit. None: a whole step's.", at_least=1
    )
    rollout_dtype: str | None = setting(
        None,
        "bfloat16: answers are sampled with a copy of the float32 weights, made anew at each step that samples, at half their "
        "memory; log-probabilities are scored with the weights themselves. None: with those.",
        choices=("bfloat16",),
    )

    # Loss
    beta: float = setting(0.04, "Weight of the KL term to the reference policy; 0: no reference is kept.", at_least=0)
    loss_type: str = setting("grpo", f"Normalisation of the loss: one of {', '.join(LOSS_TYPES)}.", choices=LOSS_TYPES)
    epsilon: float = setting(
        0.2, "Clipping of the probability ratio from below (and above, unless epsilon_high is given).", at_least=0, at_most=1
    )
    epsilon_high: float | None = setting(
        None, "Clipping of the ratio from above; for cispo the cap of the ratio (about 5).", at_least=0
    )
    delta: float | None = setting(None, "Two-sided clipping: cap of the unclipped ratio; needs delta > 1 + epsilon.", more_than=1)
    importance_sampling_level: str = setting(
        "token", "Ratio per token (GRPO) or per sequence (GSPO).", choices=("token", "sequence")
    )
    use_bias_correction_kl: bool = setting(
        False, "Multiply the KL term by the ratio (DeepSeek-V3.2); false is the classic k3 estimate."
    )
    top_entropy_quantile: float = setting(
        1.0, "Train on the share of tokens with the highest entropy only; 1: all.", at_least=0, at_most=1
    )
    mask_truncated_completions: bool = setting(False, "Leave answers without an end token out of the loss.")

    # Rewards and advantages
    reward_weights: list[float] | None = setting(None, "Weight of each reward function; None: all 1.")
    scale_rewards: str = setting(
        "group", "Divide advantages by the std of the group, of the batch, or not.", choices=("group", "batch", "none")
    )
    num_iterations: int = setting(1, "Optimizer steps taken on the same answers.", at_least=1)
    dynamic_sampling: bool = setting(False, "Replace groups whose rewards are all equal by other prompts (DAPO).")
    dynamic_sampling_max_rounds: int = setting(3, "How often to try before such a group is kept.", at_least=1)

    # Reference policy
    sync_ref_model: bool = setting(False, "Move the reference towards the policy every ref_model_sync_steps (TR-DPO).")
    ref_model_sync_steps: int = setting(512, "Steps between these moves.", at_least=1)
    ref_model_mixup_alpha: float = setting(0.6, "Share of the policy in the moved reference.", at_least=0, at_most=1)

    log_completions: bool = setting(False, "Write sampled answers and their rewards to completions.jsonl, and show some.")

    def __post_init__(self):
        super().__post_init__()
        checks = [
            (self.loss_type in LOSS_TYPES, f"--loss_type {self.loss_type}: expected one of {', '.join(LOSS_TYPES)}"),
            (self.importance_sampling_level in ("token", "sequence"), "--importance_sampling_level: expected token or sequence"),
            (self.rollout_dtype in (None, "bfloat16"), f"--rollout_dtype {self.rollout_dtype}: expected bfloat16"),
            (not self.rollout_dtype or bool(self.bf16), "--rollout_dtype needs --bf16, whose casts its copy takes the place of"),
            (self.scale_rewards in ("group", "batch", "none"), "--scale_rewards: expected group, batch or none"),
            (
                self.delta is None or self.delta > 1 + self.epsilon,
                f"--delta {self.delta}: expected more than 1 + --epsilon, {1 + self.epsilon:g}",
            ),
            (
                self.reward_weights is None or any(self.reward_weights),
                f"--reward_weights {' '.join(map(str, self.reward_weights or []))}: expected one that is not 0",
            ),
            (not (self.sync_ref_model and self.beta == 0), "--sync_ref_model needs a reference policy: set --beta above 0"),
        ]
        refuse(checks)

    @property
    def loss(self) -> GRPOLoss:
        return GRPOLoss(**{name: getattr(self, name) for name in GRPOLoss.names()})

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(self.temperature, self.top_p, self.top_k, self.min_p, self.repetition_penalty)


# What a run without flags uses instead of the papers' settings: the starter policy is small and starts from little.
STARTER = {
    "learning_rate": 3e-4,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "num_generations": 8,
    "max_completion_length": 32,
    "max_steps": 120,
    "save_steps": 60,
    "save_total_limit": 2,
}
