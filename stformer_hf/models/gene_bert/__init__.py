"""GeneBert: configuration, models and tokenizer. A checkpoint carries copies of these three files."""
