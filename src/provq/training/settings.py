"""How something is trained: every number of the recipe's table `training`."""

from typing import Annotated, Literal, final

from pydantic import Field

from provq.errors import UsageError
from provq.ops.blend import TokensHarden
from provq.spec import checked

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(gt=0)]


@final
class Training:
    """How a tokenizer or a prior is trained; what speaks of codes and hardness is for tokenizers alone.

    Args:
        steps: Optimizer steps.
        batch_size: Items a step, over all ranks and accumulated batches together.
        accumulate: In how many parts a rank works off its share of a batch.
        learning_rate: Peak rate of the networks.
        codebook_learning_rate: Constant rate of learned codebooks; that of the networks where it is missing.
        warmup: Share of the steps in which the networks' rate rises.
        final_learning_rate: Ratio of the peak at which the networks' rate ends.
        betas: Decay of AdamW's moments.
        weight_decay: AdamW's, for the networks.
        clip: Largest norm of the gradient; 0 clips nothing.
        average_decay: Decay of the moving average of the networks' weights that is saved and evaluated; 0 keeps none.
        revive_until: Share of the steps after which no dead code is moved any more.
        hand_overs: How often codebooks are founded anew while hardness rises, equal parts of the way apart: first when
            it leaves 0, last when it reaches 1.
        tokens_harden: How hardness is spread over the tokens of a batch: "together", "at_random" or "nearest_first".
        latents_per_code: How many fresh latents a codebook is founded on, times its number of codes.
        start_from: A saved tokenizer or a run whose weights to start from; "none" draws them. A codebook is taken over
            where it is of one kind and size, and founded like a new one elsewhere.
        precision: "32-true", or mixed precision of the networks; quantizers work in float32 under all. "16-mixed"
            scales the loss, and is for GPUs.
        compile: Whether what is trained is compiled, a tokenizer into one graph.
        strategy: How ranks share the networks: "ddp" gives each all of them, "fsdp" each a part.
        devices: How many devices on this machine.
        workers: Reading processes a rank; 0 reads in the training process.
        seed: Fixes weights, order and augmentation.
        log_every: Steps between records of the loss.
        probe_every: Steps between looks at held-out items; 0 never looks.
        probe_items: How many of them are looked at.
        checkpoint_every: Steps between checkpoints; there is always one at the end.
        keep_checkpoints: How many are kept.

    Raises:
        UsageError: An argument is out of bounds, or does not go with networks in parts.
    """

    @checked
    def __init__(
        self,
        steps: Positive,
        batch_size: Positive = 32,
        *,
        accumulate: Positive = 1,
        learning_rate: Rate = 1e-3,
        codebook_learning_rate: Rate | None = None,
        warmup: Share = 0.05,
        final_learning_rate: Share = 0.05,
        betas: tuple[Decay, Decay] = (0.9, 0.99),
        weight_decay: Annotated[float, Field(ge=0)] = 0.0,
        clip: Annotated[float, Field(ge=0)] = 1.0,
        average_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        revive_until: Share = 0.85,
        hand_overs: Annotated[int, Field(ge=0)] = 5,
        tokens_harden: TokensHarden = "together",
        latents_per_code: Positive = 10,
        start_from: str = "none",
        precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
        compile: bool = False,
        strategy: Literal["ddp", "fsdp"] = "ddp",
        devices: Positive = 1,
        workers: Annotated[int, Field(ge=0)] = 0,
        seed: Annotated[int, Field(ge=0)] = 0,
        log_every: Positive = 10,
        probe_every: Annotated[int, Field(ge=0)] = 0,
        probe_items: Positive = 64,
        checkpoint_every: Positive = 1000,
        keep_checkpoints: Positive = 1,
    ) -> None:
        if strategy == "fsdp" and (average_decay or compile or precision == "16-mixed"):
            raise UsageError(
                "Training: strategy='fsdp' goes with average_decay=0, compile=False, and precision '32-true' or "
                f"'bf16-mixed', got {average_decay}, {compile} and {precision!r}"
            )
        self.steps = steps
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.learning_rate = learning_rate
        self.codebook_learning_rate = codebook_learning_rate
        self.warmup = warmup
        self.final_learning_rate = final_learning_rate
        self.betas = betas
        self.weight_decay = weight_decay
        self.clip = clip
        self.average_decay = average_decay
        self.revive_until = revive_until
        self.hand_overs = hand_overs
        self.tokens_harden = tokens_harden
        self.latents_per_code = latents_per_code
        self.start_from = start_from
        self.precision = precision
        self.compile = compile
        self.strategy = strategy
        self.devices = devices
        self.workers = workers
        self.seed = seed
        self.log_every = log_every
        self.probe_every = probe_every
        self.probe_items = probe_items
        self.checkpoint_every = checkpoint_every
        self.keep_checkpoints = keep_checkpoints
