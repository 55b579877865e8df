"""Logistic regression in numpy, on data that every side makes for itself out of the same seed."""

import numpy as np

FEATURES = 20


def examples(seed, count=2000):
    """Points on both sides of a plane, some of them on the wrong one."""
    plane = np.random.default_rng(7).normal(size=FEATURES)
    random = np.random.default_rng(seed)
    points = random.normal(size=(count, FEATURES))
    labels = points @ plane + random.normal(scale=0.3, size=count) > 0
    return points, labels.astype(float)


def share(partition, partitions):
    """The examples of one node: every one of `partitions` has its own."""
    points, labels = examples(seed=1)
    return points[partition::partitions], labels[partition::partitions]


def train(weights, points, labels, epochs=20, rate=1.0):
    """Gradient descent from these weights; gives new ones."""
    for _ in range(epochs):
        likely = 1 / (1 + np.exp(-points @ weights))
        weights = weights - rate * points.T @ (likely - labels) / len(labels)
    return weights


def accuracy(weights):
    """The share of right answers on examples that no node has."""
    points, labels = examples(seed=2)
    return float(np.mean((points @ weights > 0) == labels))
