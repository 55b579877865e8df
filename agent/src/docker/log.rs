//! The container's log as lines, with bounded memory use.

use std::borrow::Cow;
use std::fmt;
use std::pin::Pin;
use std::time::Duration;

use bollard::container::LogOutput;
use bollard::errors::Error as ApiError;
use futures_util::{Stream, StreamExt as _};
use hyper::body::{Buf as _, Bytes};
use tokio::time::Instant;

use crate::backoff::Backoff;

/// Length at which a line is truncated.
const MAX_BYTES: usize = 1024;
/// Delays before a log that cannot be read is opened again. Some log drivers can never be read.
const INITIAL_DELAY: Duration = Duration::from_secs(1);
const MAX_DELAY: Duration = Duration::from_secs(60);

type Frames = Pin<Box<dyn Stream<Item = Result<LogOutput, ApiError>> + Send>>;

/// Lines of a container's log, as they are written.
pub(crate) struct Log {
    open: Box<dyn Fn() -> Frames + Send>,
    frames: Frames,
    /// When to open the log again after an error.
    reopen_at: Option<Instant>,
    backoff: Backoff,
    /// Unprocessed part of the last frame.
    rest: Bytes,
    is_stderr: bool,
    stdout: Line,
    stderr: Line,
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Log").finish_non_exhaustive()
    }
}

impl Log {
    /// Creates a log that calls `open` for the frames, now and on every [`reopen`](Self::reopen).
    pub(crate) fn new<F>(open: impl Fn() -> F + Send + 'static) -> Self
    where
        F: Stream<Item = Result<LogOutput, ApiError>> + Send + 'static,
    {
        let open = Box::new(move || -> Frames { Box::pin(open()) });
        Self {
            frames: open(),
            open,
            reopen_at: None,
            backoff: Backoff::new(INITIAL_DELAY, MAX_DELAY),
            rest: Bytes::new(),
            is_stderr: false,
            stdout: Line::default(),
            stderr: Line::default(),
        }
    }

    /// Returns the next line without its line break, truncated to one KiB; `None` at the end of the
    /// log. After an error, the log is opened again with backoff and read from the beginning.
    /// Cancel safe.
    pub(crate) async fn next_line(&mut self) -> Option<Cow<'_, str>> {
        loop {
            let line = if self.is_stderr { &mut self.stderr } else { &mut self.stdout };
            if line.append(&mut self.rest) {
                // Borrowed again, because returning the first borrow would extend it over the loop.
                let line = if self.is_stderr { &self.stderr } else { &self.stdout };
                return Some(String::from_utf8_lossy(&line.bytes));
            }
            if let Some(reopen_at) = self.reopen_at {
                tokio::time::sleep_until(reopen_at).await;
                self.reopen();
            }
            match self.frames.next().await? {
                Ok(frame) => {
                    self.backoff.reset();
                    self.is_stderr = matches!(frame, LogOutput::StdErr { .. });
                    self.rest = frame.into_bytes();
                }
                Err(error) => {
                    tracing::debug!("cannot read the container's log: {error}; retrying");
                    self.reopen_at = Some(Instant::now() + self.backoff.next_delay(0.0));
                }
            }
        }
    }

    /// Opens the log again from the beginning.
    pub(crate) fn reopen(&mut self) {
        self.reopen_at = None;
        (self.stdout, self.stderr, self.rest) = Default::default();
        self.frames = (self.open)();
    }
}

/// A line, possibly incomplete.
#[derive(Debug, Default)]
struct Line {
    bytes: Vec<u8>,
    is_complete: bool,
}

impl Line {
    /// Moves the bytes of this line out of `input` and returns whether the line is complete. Starts
    /// a new line after a complete one.
    fn append(&mut self, input: &mut Bytes) -> bool {
        if std::mem::take(&mut self.is_complete) {
            self.bytes.clear();
        }
        let end = input.iter().position(|byte| *byte == b'\n');
        let part = &input[..end.unwrap_or(input.len())];
        let remaining = MAX_BYTES - self.bytes.len();
        self.bytes.extend_from_slice(&part[..part.len().min(remaining)]);
        match end {
            Some(end) => input.advance(end + 1),
            None => input.clear(),
        }
        self.is_complete = end.is_some();
        self.is_complete
    }
}

#[cfg(test)]
mod tests {
    use futures_util::stream;

    use super::*;

    fn out(text: &'static [u8]) -> Result<LogOutput, ApiError> {
        Ok(LogOutput::StdOut { message: Bytes::from_static(text) })
    }

    fn err(text: &'static [u8]) -> Result<LogOutput, ApiError> {
        Ok(LogOutput::StdErr { message: Bytes::from_static(text) })
    }

    async fn lines(frames: Vec<Result<LogOutput, ApiError>>) -> Vec<String> {
        lines_of_openings(vec![frames]).await
    }

    /// Reads all lines of a log that yields the next of these lists each time it is opened.
    async fn lines_of_openings(openings: Vec<Vec<Result<LogOutput, ApiError>>>) -> Vec<String> {
        let openings = std::sync::Mutex::new(openings.into_iter());
        let mut log = Log::new(move || stream::iter(openings.lock().unwrap().next().unwrap()));
        let mut lines = Vec::new();
        while let Some(line) = log.next_line().await {
            lines.push(line.into_owned());
        }
        lines
    }

    #[tokio::test]
    async fn joins_lines_across_frames_for_each_stream() {
        let frames = vec![
            out(b"a\nb"),
            err(b"x"),
            out(b"c\n"),
            err(b"y\n\n"),
            out(b""),
            out(b"\xff\xfe!\n"),
            out(b"no end"),
        ];
        assert_eq!(lines(frames).await, ["a", "bc", "xy", "", "\u{fffd}\u{fffd}!"]);
    }

    #[tokio::test]
    async fn long_line_is_truncated_to_one_kibibyte() {
        let mut frames: Vec<_> = (0..1000).map(|_| out(&[b'x'; 16384])).collect();
        frames.push(out(b"\nnext\n"));
        let lines = lines(frames).await;
        assert_eq!((lines[0].len(), lines[1].as_str()), (MAX_BYTES, "next"));
        let mut line = Line::default();
        assert!(!line.append(&mut Bytes::from_static(&[b'x'; 16384])));
        assert!(line.bytes.capacity() <= 2 * MAX_BYTES);
    }

    #[tokio::test(start_paused = true)]
    async fn unreadable_log_is_reopened_from_the_beginning() {
        let failed = || Err(ApiError::RequestTimeoutError);
        let openings = vec![vec![out(b"a\nhalf"), failed()], vec![failed()], vec![out(b"a\nb\n")]];
        let since = Instant::now();
        assert_eq!(lines_of_openings(openings).await, ["a", "a", "b"]);
        assert_eq!(since.elapsed(), 3 * INITIAL_DELAY);
    }

    #[tokio::test]
    async fn next_line_is_cancel_safe() {
        let slow = || {
            stream::iter([out(b"a"), out(b"b\n")]).then(|frame| async {
                tokio::task::yield_now().await;
                frame
            })
        };
        let mut log = Log::new(slow);
        // Polled once and dropped, with half of the line read.
        for _ in 0..2 {
            assert_eq!(futures_util::FutureExt::now_or_never(log.next_line()), None);
        }
        assert_eq!(log.next_line().await.as_deref(), Some("ab"));
    }
}
