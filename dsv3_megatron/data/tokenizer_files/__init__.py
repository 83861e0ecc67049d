"""What a published tokenizer's files say, made safe for training text."""
