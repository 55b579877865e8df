//! The table and the raw figures.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::{Map, Value, json};

/// Measurements so far. Each row is printed at once.
#[derive(Debug, Default)]
pub(crate) struct Report {
    raw: Map<String, Value>,
}

impl Report {
    /// Starts a section of the table.
    pub(crate) fn part(&self, title: &str) {
        println!("\n== {title}");
    }

    /// Prints a row; `aim` is the target value, or empty.
    pub(crate) fn row(&self, what: &str, figure: &str, aim: &str) {
        println!("   {what:<50} {figure:>26}  {aim}");
    }

    /// Stores the raw figures of a row.
    pub(crate) fn keep(&mut self, name: &str, figures: impl Into<Value>) {
        self.raw.insert(name.to_owned(), figures.into());
    }

    /// Writes the raw figures to a file.
    pub(crate) fn finish(self) {
        let file = Path::new("target/bench.json");
        let text = format!("{:#}\n", Value::from(self.raw));
        fs::write(file, text).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        println!("\n   raw figures: {}", file.display());
    }
}

/// Returns the median; for an even number of figures the mean of the middle two.
pub(crate) fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

/// Returns the median and quartiles of milliseconds: `6.4 ms (5.9 to 7.2)`.
pub(crate) fn with_quartiles(figures: &[f64]) -> String {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (lower, upper) = sorted.split_at(sorted.len() / 2);
    format!("{:.1} ms ({:.1} to {:.1})", median(&sorted), median(lower), median(upper))
}

/// Converts to milliseconds.
pub(crate) fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Rounds figures to microseconds.
pub(crate) fn rounded(figures: &[f64]) -> Value {
    figures.iter().map(|figure| json!((figure * 1e3).round() / 1e3)).collect()
}
