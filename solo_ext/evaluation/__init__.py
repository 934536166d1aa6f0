"""What the features are worth: kNN and linear evaluation, online and offline."""
