"""Fine-tune a checkpoint of transformers by a generated difference; the merged model loads without dist_ssn.

python examples/fine_tune_hf.py
"""

import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import dist_ssn

with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    config = GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder / "base")  # stands for a checkpoint of yours

    model = GPT2LMHeadModel.from_pretrained(folder / "base")
    dist_ssn.share(model, "5%", keep=True)  # the weights stay; a bank generates a difference, which starts at zero
    print(dist_ssn.summary(model))
    optimizer = torch.optim.AdamW(dist_ssn.parameter_groups(model, weight_decay=0.0, lr=3e-3))
    tokens = torch.tensor([list(b"the quick brown fox jumps over the lazy dog. ")])
    for step in range(60):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, 59):
            print(f"step {step}: loss {loss.item():.3f}")

    file = dist_ssn.save(model, folder / "difference")
    whole = sum(path.stat().st_size for path in (folder / "base").iterdir())
    print(f"the difference has {file.stat().st_size:,} bytes, the model {whole:,}")
    again = dist_ssn.load(GPT2LMHeadModel.from_pretrained(folder / "base"), folder / "difference")
    dist_ssn.materialize(again).save_pretrained(folder / "merged")  # pyright: ignore[reportCallIssue]
    plain = GPT2LMHeadModel.from_pretrained(folder / "merged")  # needs no dist_ssn
    print(f"merged: loss {plain(tokens, labels=tokens).loss.item():.3f}")
