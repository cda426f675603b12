"""Fine-tuning by a generated difference, beside full fine-tuning and the adapters of PEFT."""
