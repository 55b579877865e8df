//! A container's log, line by line, in bounded memory.

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

/// What is kept of a line; the rest is passed over.
const MAX_BYTES: usize = 1024;
/// The pause before a log that cannot be read is read again: the first, and the longest. There are
/// drivers that never can.
const INITIAL_DELAY: Duration = Duration::from_secs(1);
const MAX_DELAY: Duration = Duration::from_secs(60);

type Frames = Pin<Box<dyn Stream<Item = Result<LogOutput, ApiError>> + Send>>;

/// The lines of a container, as they are written.
pub struct Log {
    open: Box<dyn Fn() -> Frames + Send>,
    frames: Frames,
    /// When it is to be opened again, where it could not be read.
    again_at: Option<Instant>,
    backoff: Backoff,
    /// What of the last frame was not looked at yet.
    rest: Bytes,
    of_stderr: bool,
    out: Line,
    err: Line,
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Log").finish_non_exhaustive()
    }
}

impl Log {
    /// The lines in the frames that are there when it is opened.
    pub(crate) fn new<F>(open: impl Fn() -> F + Send + 'static) -> Self
    where
        F: Stream<Item = Result<LogOutput, ApiError>> + Send + 'static,
    {
        let open = Box::new(move || -> Frames { Box::pin(open()) });
        Self {
            frames: open(),
            open,
            again_at: None,
            backoff: Backoff::new(INITIAL_DELAY, MAX_DELAY),
            rest: Bytes::new(),
            of_stderr: false,
            out: Line::default(),
            err: Line::default(),
        }
    }

    /// The next line, without its end; of a long one the first kibibyte. `None` once the log has
    /// ended. One that cannot be read is opened again after a pause, and its lines come again from
    /// the first. A call that is given up loses nothing.
    pub async fn next_line(&mut self) -> Option<Cow<'_, str>> {
        loop {
            let line = if self.of_stderr { &mut self.err } else { &mut self.out };
            if line.take(&mut self.rest) {
                // The borrow of a line that is returned would last for the whole loop.
                let line = if self.of_stderr { &self.err } else { &self.out };
                return Some(String::from_utf8_lossy(&line.kept));
            }
            if let Some(again_at) = self.again_at {
                tokio::time::sleep_until(again_at).await;
                self.reopen();
            }
            match self.frames.next().await? {
                Ok(frame) => {
                    self.backoff.reset();
                    self.of_stderr = matches!(frame, LogOutput::StdErr { .. });
                    self.rest = frame.into_bytes();
                }
                Err(error) => {
                    tracing::debug!("the container's log cannot be read: {error}");
                    self.again_at = Some(Instant::now() + self.backoff.next_delay(0.0));
                }
            }
        }
    }

    /// Opens it again; its lines come again from the first.
    pub fn reopen(&mut self) {
        self.again_at = None;
        (self.out, self.err, self.rest) = Default::default();
        self.frames = (self.open)();
    }
}

/// A line, in the making or made.
#[derive(Debug, Default)]
struct Line {
    kept: Vec<u8>,
    is_whole: bool,
}

impl Line {
    /// Takes what belongs to this line; whether it is whole now.
    fn take(&mut self, bytes: &mut Bytes) -> bool {
        if std::mem::take(&mut self.is_whole) {
            self.kept.clear();
        }
        let end = bytes.iter().position(|byte| *byte == b'\n');
        let part = &bytes[..end.unwrap_or(bytes.len())];
        let room = MAX_BYTES - self.kept.len();
        self.kept.extend_from_slice(&part[..part.len().min(room)]);
        match end {
            Some(end) => bytes.advance(end + 1),
            None => bytes.clear(),
        }
        self.is_whole = end.is_some();
        self.is_whole
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
        lines_of_each(vec![frames]).await
    }

    /// Of a log that has these frames each time it is opened.
    async fn lines_of_each(openings: Vec<Vec<Result<LogOutput, ApiError>>>) -> Vec<String> {
        let openings = std::sync::Mutex::new(openings.into_iter());
        let mut log = Log::new(move || stream::iter(openings.lock().unwrap().next().unwrap()));
        let mut lines = Vec::new();
        while let Some(line) = log.next_line().await {
            lines.push(line.into_owned());
        }
        lines
    }

    #[tokio::test]
    async fn lines_are_joined_across_frames_each_stream_for_itself() {
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
    async fn a_line_without_end_costs_a_kibibyte() {
        let mut frames: Vec<_> = (0..1000).map(|_| out(&[b'x'; 16384])).collect();
        frames.push(out(b"\nnext\n"));
        let lines = lines(frames).await;
        assert_eq!((lines[0].len(), lines[1].as_str()), (MAX_BYTES, "next"));
        let mut line = Line::default();
        assert!(!line.take(&mut Bytes::from_static(&[b'x'; 16384])));
        assert!(line.kept.capacity() <= 2 * MAX_BYTES);
    }

    #[tokio::test(start_paused = true)]
    async fn a_log_that_cannot_be_read_is_read_again_from_its_beginning() {
        let bad = || Err(ApiError::RequestTimeoutError);
        let openings = vec![vec![out(b"a\nhalf"), bad()], vec![bad()], vec![out(b"a\nb\n")]];
        let since = Instant::now();
        assert_eq!(lines_of_each(openings).await, ["a", "a", "b"]);
        assert_eq!(since.elapsed(), 3 * INITIAL_DELAY);
    }

    #[tokio::test]
    async fn a_call_that_is_given_up_loses_nothing() {
        let slow = || {
            stream::iter([out(b"a"), out(b"b\n")]).then(|frame| async {
                tokio::task::yield_now().await;
                frame
            })
        };
        let mut log = Log::new(slow);
        // Polled once, and dropped: the line is half there.
        for _ in 0..2 {
            assert_eq!(futures_util::FutureExt::now_or_never(log.next_line()), None);
        }
        assert_eq!(log.next_line().await.as_deref(), Some("ab"));
    }
}
