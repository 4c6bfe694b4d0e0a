"""Customers of a web shop: what they bought in nine months, and whether they came back."""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np

from _harness import fail

CUT, END = 273, 545  # days from 1 January 1997: to 30 September 1997, to 30 June 1998
BASIC = (
    "orders",
    "CDs",
    "dollars",
    "largest order",
    "first order",
    "last order",
    "span",
    "mean gap",
)
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep")
NAMES = (*BASIC, *(f"CDs in {month}" for month in MONTHS))


class Part(NamedTuple):
    """Features `[n, 17]`, standardized, float32, and who came back `[n]`, int32."""

    x: np.ndarray
    y: np.ndarray


class Users(NamedTuple):
    """60 % to train on, 20 % to choose on, 20 % to report on."""

    train: Part
    validation: Part
    test: Part


def purchases() -> np.ndarray:
    """`[n, 4]`: customer, day, CDs, dollars; as the package lifetimes carries them.

    The file lies in the package, so lifetimes itself, and what it imports, is not loaded.
    """
    spec = importlib.util.find_spec("lifetimes")
    if spec is None or spec.origin is None:
        fail("the purchases come with the package lifetimes: pip install lifetimes")
    path = Path(spec.origin).parent / "datasets" / "CDNOW_master.txt"
    if not path.exists():
        fail(f"this lifetimes has no {path.name}: pip install 'lifetimes>=0.11'")
    lines = [line.split() for line in path.read_text().splitlines()[1:] if line.strip()]
    table = np.array([[int(c), 0, int(n), float(d)] for c, _, n, d in lines])
    dates = [f"{day[:4]}-{day[4:6]}-{day[6:]}" for _, day, _, _ in lines]
    days = np.array(dates, "datetime64[D]") - np.datetime64("1997-01-01")
    table[:, 1] = days.astype(int)
    return table


def cleaned(table: np.ndarray) -> np.ndarray:
    """One row for each customer and day, without what was given away or is not sold."""
    table = table[(table[:, 2] > 0) & (table[:, 3] > 0)]
    keys, row = np.unique(table[:, :2], axis=0, return_inverse=True)
    sums = np.zeros((len(keys), 2))
    np.add.at(sums, row.reshape(-1), table[:, 2:])
    return np.concatenate([keys, sums], 1)


def features(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is known of each customer at the cut, `[n, 17]`, and who bought after it."""
    before, after = table[table[:, 1] < CUT], table[(table[:, 1] >= CUT) & (table[:, 1] <= END)]
    customers, row = np.unique(before[:, 0], return_inverse=True)
    n, day = len(customers), before[:, 1]
    total = lambda values: np.bincount(row, values, n)
    orders = total(np.ones(len(before)))
    largest, first, last = np.zeros(n), np.full(n, np.inf), np.full(n, -np.inf)
    np.maximum.at(largest, row, before[:, 3])
    np.minimum.at(first, row, day)
    np.maximum.at(last, row, day)
    span = last - first
    gap = span / np.maximum(orders - 1, 1)
    starts = np.array([0, 31, 59, 90, 120, 151, 181, 212, 243])
    month = np.searchsorted(starts, day, "right") - 1
    monthly = np.stack([total(before[:, 2] * (month == m)) for m in range(9)], 1)
    counts = [orders, total(before[:, 2]), total(before[:, 3]), largest]
    x = np.concatenate([np.log1p(counts), [first, last, span, gap], np.log1p(monthly.T)]).T
    return x, np.isin(customers, after[:, 0]).astype(np.int32)


def users() -> Users:
    """Cleaned, standardized by what the training customers are, split with a fixed seed."""
    x, y = features(cleaned(purchases()))
    order = np.random.default_rng(0).permutation(len(x))
    ends = [int(0.6 * len(x)), int(0.8 * len(x))]
    train, validation, test = np.split(order, ends)
    mean, deviation = x[train].mean(0), x[train].std(0)
    scaled = ((x - mean) / deviation).astype(np.float32)
    return Users(*(Part(scaled[part], y[part]) for part in (train, validation, test)))
