//! Exponential backoff with jitter.

use std::time::Duration;

/// Delays between attempts that keep failing. The first one is `initial`, each further one is twice
/// the previous one, up to `max`. Pure: the caller supplies the random number.
#[derive(Debug, Clone, PartialEq)]
pub struct Backoff {
    initial: Duration,
    max: Duration,
    /// Largest random addition to a delay, as a fraction of that delay.
    jitter: f64,
    next: Duration,
    attempts: u32,
}

impl Backoff {
    /// Doubles from `initial` to `max`, without jitter. If `initial` is not less than `max`, every
    /// delay is `max`.
    pub fn new(initial: Duration, max: Duration) -> Self {
        let initial = initial.min(max);
        Self { initial, max, jitter: 0.0, next: initial, attempts: 0 }
    }

    /// Adds up to this fraction of a delay to it, so that nodes that boot together, or lose the
    /// same peer, do not retry together.
    #[must_use]
    pub fn with_jitter(self, fraction: f64) -> Self {
        Self { jitter: fraction.max(0.0), ..self }
    }

    /// Counts a failed attempt and returns the delay before the next one. `chance`, from 0 to 1,
    /// is how much of the jitter is added.
    pub fn next_delay(&mut self, chance: f64) -> Duration {
        let delay = self.next;
        self.next = delay.saturating_mul(2).min(self.max);
        self.attempts = self.attempts.saturating_add(1);
        delay + delay.mul_f64(self.jitter * chance.clamp(0.0, 1.0))
    }

    /// Returns the delay that [`next_delay`](Self::next_delay) returns next, without jitter.
    pub fn peek(&self) -> Duration {
        self.next
    }

    /// Starts again from `initial`, after a success.
    pub fn reset(&mut self) {
        (self.next, self.attempts) = (self.initial, 0);
    }

    /// Returns the number of failed attempts since the start or the last [`reset`](Self::reset).
    pub fn attempts(&self) -> u32 {
        self.attempts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn delays<const N: usize>(backoff: &mut Backoff) -> [u64; N] {
        std::array::from_fn(|_| backoff.next_delay(0.0).as_secs())
    }

    #[test]
    fn doubles_up_to_max() {
        let mut backoff = Backoff::new(seconds(10), seconds(300));
        assert_eq!(delays(&mut backoff), [10, 20, 40, 80, 160, 300, 300, 300]);
        assert_eq!(backoff.attempts(), 8);
    }

    #[test]
    fn max_below_initial_is_the_delay() {
        assert_eq!(delays(&mut Backoff::new(seconds(10), seconds(3))), [3, 3, 3]);
        assert_eq!(delays(&mut Backoff::new(seconds(10), seconds(10))), [10, 10, 10]);
    }

    #[test]
    fn unlimited_max_does_not_overflow() {
        let mut backoff = Backoff::new(seconds(1), Duration::MAX);
        for _ in 0..1000 {
            backoff.next_delay(1.0);
        }
        assert_eq!(backoff.peek(), Duration::MAX);
    }

    #[test]
    fn reset_starts_from_initial() {
        let mut backoff = Backoff::new(seconds(1), seconds(60));
        assert_eq!(delays(&mut backoff), [1, 2, 4]);
        assert_eq!((backoff.peek(), backoff.attempts()), (seconds(8), 3));
        backoff.reset();
        assert_eq!((backoff.peek(), backoff.attempts()), (seconds(1), 0));
        assert_eq!(delays(&mut backoff), [1, 2]);
    }

    #[test]
    fn jitter_is_bounded_by_its_fraction() {
        let delay_at = |chance| {
            let mut backoff = Backoff::new(seconds(40), seconds(60)).with_jitter(0.5);
            let delay = backoff.next_delay(chance);
            assert_eq!(backoff.peek(), seconds(60), "jitter must not grow the delays");
            delay.as_secs()
        };
        assert_eq!([0.0, 0.5, 1.0, 7.0].map(delay_at), [40, 50, 60, 60]);
    }
}
