"""What a pre-trained model understands without fine-tuning: labels, masked words, vectors."""
