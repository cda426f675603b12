"""What fine-tuning by a generated difference reaches, beside full fine-tuning and the adapters of PEFT."""
