"""The demo's label column, and the classifiers that it compares."""

LABEL = "bulk_labels"
MAJORITY, GENES, PCA = "majority class", "logistic regression on genes", "PCA50 + logistic regression"
START, TRAINED = "GeneBert, start", "GeneBert, fine-tuned"
