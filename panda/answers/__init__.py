"""What a trained model answers: loading it for inference, generation, chat."""
