"""kNN and linear evaluation of features, online and offline."""
