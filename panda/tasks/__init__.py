"""What is learned: text to token ids and labels, and the loss."""
