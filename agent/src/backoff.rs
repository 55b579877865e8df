//! When to ask OneGate again: the two ways of `FL_EDGE_BACKOFF`. Pure; chance comes from the
//! caller.

use std::time::Duration;

/// Nodes that boot together do not ask together: the first try comes within this time. Docker and
/// the GPU take theirs meanwhile.
pub const SPREAD: Duration = Duration::from_secs(5);
/// The pause after the first try.
const FIRST: Duration = Duration::from_secs(10);
/// The tries of the way `fixed`.
const FIXED_TRIES: u32 = 30;

/// The pauses between tries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backoff {
    next: Duration,
    /// What the pauses grow to; `None`: they do not grow.
    cap: Option<Duration>,
    /// The tries that have been made.
    tries: u32,
}

impl Backoff {
    /// 10 s, doubling up to `cap`, without end.
    pub fn exponential(cap: Duration) -> Self {
        Self { next: FIRST.min(cap), cap: Some(cap), tries: 0 }
    }

    /// 30 tries, 10 s apart.
    pub fn fixed() -> Self {
        Self { next: FIRST, cap: None, tries: 0 }
    }

    /// The pause after one more try that failed; `None`: that was the last one.
    pub fn after_failure(&mut self) -> Option<Duration> {
        self.tries = self.tries.saturating_add(1);
        let pause = self.next;
        match self.cap {
            Some(cap) => self.next = (pause * 2).min(cap),
            None if self.tries >= FIXED_TRIES => return None,
            None => {}
        }
        Some(pause)
    }

    /// The tries that have failed.
    pub fn tries(&self) -> u32 {
        self.tries
    }
}

/// `pause` and up to half of it on top: nodes that boot together, or whose SuperLink comes late for
/// all of them, do not ask together. `chance` is from 0 to 1.
pub fn with_jitter(pause: Duration, chance: f64) -> Duration {
    pause + pause.mul_f64(chance.clamp(0.0, 1.0) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(backoff: &mut Backoff, count: usize) -> Vec<u64> {
        std::iter::from_fn(|| backoff.after_failure())
            .take(count)
            .map(|pause| pause.as_secs())
            .collect()
    }

    #[test]
    fn exponential_doubles_up_to_the_cap_without_end() {
        assert_eq!(
            seconds(&mut Backoff::exponential(Duration::from_secs(300)), 8),
            [10, 20, 40, 80, 160, 300, 300, 300]
        );
        assert_eq!(seconds(&mut Backoff::exponential(Duration::from_secs(3)), 3), [3, 3, 3]);
        let mut backoff = Backoff::exponential(Duration::from_secs(u64::from(u32::MAX)));
        assert!((0..10_000).all(|_| backoff.after_failure().is_some()));
    }

    #[test]
    fn fixed_is_thirty_tries_ten_seconds_apart() {
        let mut backoff = Backoff::fixed();
        assert_eq!(seconds(&mut backoff, 100), [10; 29]);
        assert_eq!(backoff.tries(), 30);
    }

    #[test]
    fn jitter_only_adds_and_at_most_half() {
        let pause = Duration::from_secs(40);
        assert_eq!(
            [0.0, 0.5, 1.0, 7.0].map(|chance| with_jitter(pause, chance).as_secs()),
            [40, 50, 60, 60]
        );
    }
}
