"""Logistic regression in numpy on synthetic data that every process generates from one seed."""

import numpy as np

FEATURES = 20


def examples(seed, count=2000):
    """Returns points labelled by the side of a plane, with noise."""
    plane = np.random.default_rng(7).normal(size=FEATURES)
    random = np.random.default_rng(seed)
    points = random.normal(size=(count, FEATURES))
    labels = points @ plane + random.normal(scale=0.3, size=count) > 0
    return points, labels.astype(float)


def share(partition, partitions):
    """Returns the examples of one of `partitions` disjoint partitions."""
    points, labels = examples(seed=1)
    return points[partition::partitions], labels[partition::partitions]


def train(weights, points, labels, epochs=20, rate=1.0):
    """Returns the weights after gradient descent from these weights."""
    for _ in range(epochs):
        likely = 1 / (1 + np.exp(-points @ weights))
        weights = weights - rate * points.T @ (likely - labels) / len(labels)
    return weights


def accuracy(weights):
    """Returns the accuracy on examples that no node has."""
    points, labels = examples(seed=2)
    return float(np.mean((points @ weights > 0) == labels))
