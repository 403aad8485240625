"""A DeepSpeed script with one line changed: the import. Alone, or: torchrun --nproc-per-node 2 this_file"""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor, nn

from twofold.train import deepspeed

CONFIG = {
    "train_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "steps_per_print": 50,
    "zero_optimization": {"stage": 2, "overlap_comm": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.01}},
    "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 5, "total_num_steps": 100}},
}


class Sorter(nn.Module):
    """Reads digits and says them in order."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, width)
        self.place = nn.Parameter(torch.randn(6, width) * 0.1)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, digits: Tensor) -> Tensor:
        x = self.embed(digits) + self.place
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), digits.sort().values.flatten())


def main() -> None:
    torch.manual_seed(0)
    data = torch.randint(10, (1600, 6))
    model = Sorter()
    engine, _, loader, _ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), training_data=data, config=CONFIG
    )
    for batch in loader:
        loss = engine(batch)
        engine.backward(loss)
        engine.step()
    if engine.world_size == 1:
        with tempfile.TemporaryDirectory() as directory:
            engine.save_checkpoint(directory, client_state={"read": len(data)})
            print(engine.load_checkpoint(directory)[1])


if __name__ == "__main__":
    main()
