//! Sink for the service manager: sd_notify messages.

use crate::report::node_status::{NodeStatus, Readiness};
use crate::system::systemd;

/// One message to the service manager.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Message {
    Ready(String),
    Reloading,
    Stopping(String),
    Status(String),
}

/// The part of the status that is sent to the service manager.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct View {
    readiness: Readiness,
    line: String,
}

/// Sends what has changed since the last update.
#[derive(Debug, Default)]
pub(crate) struct ServiceManager {
    sent: View,
}

impl ServiceManager {
    pub(crate) fn update(&mut self, status: &NodeStatus) {
        let view = View { readiness: status.readiness, line: status.line() };
        match message(&self.sent, &view) {
            Some(Message::Ready(line)) => systemd::ready(&line),
            Some(Message::Reloading) => systemd::reloading(),
            Some(Message::Stopping(line)) => systemd::stopping(&line),
            Some(Message::Status(line)) => systemd::status(&line),
            None => {}
        }
        self.sent = view;
    }
}

/// Returns the message for the change from `before` to `now`, if one is required.
fn message(before: &View, now: &View) -> Option<Message> {
    let line = now.line.clone();
    match now.readiness {
        Readiness::Stopping if before.readiness != Readiness::Stopping => {
            Some(Message::Stopping(line))
        }
        readiness if readiness.is_started() && !before.readiness.is_started() => {
            Some(Message::Ready(line))
        }
        Readiness::Reloading if before.readiness != Readiness::Reloading => {
            Some(Message::Reloading)
        }
        _ => (before.line != line).then_some(Message::Status(line)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `steps` one after the other and returns the message of each.
    fn messages(steps: &[fn(&mut NodeStatus)]) -> Vec<Option<Message>> {
        let (mut status, mut sent) = (NodeStatus::default(), View::default());
        let mut step = |change: &fn(&mut NodeStatus)| {
            change(&mut status);
            let view = View { readiness: status.readiness, line: status.line() };
            let message = message(&sent, &view);
            sent = view;
            message
        };
        steps.iter().map(&mut step).collect()
    }

    fn status(line: &str) -> Option<Message> {
        Some(Message::Status(line.into()))
    }

    #[test]
    fn ready_is_sent_once_and_status_when_the_line_changes() {
        assert_eq!(
            messages(&[
                |status| status.set_step("Starting the container"),
                |status| status.set_step("Starting the container"),
                |status| status.set_ready(),
                |status| status.set_ready(),
                |status| status.set_container_running(None, true),
                |status| status.set_step("The container exited"),
                |status| status.set_container_running(None, false),
                |status| status.set_ready(),
                |status| status.begin_stop("Stopping the container"),
                |status| status.set_step("Stopped"),
            ]),
            [
                status("Starting the container"),
                None,
                Some(Message::Ready("Running".into())),
                None,
                status("Running; paused: docker unpause"),
                status("The container exited"),
                None,
                status("Running"),
                Some(Message::Stopping("Stopping the container".into())),
                status("Stopped"),
            ]
        );
    }

    #[test]
    fn reload_is_reported_from_start_to_end() {
        assert_eq!(
            messages(&[
                |status| assert_eq!(status.begin_reload(), None),
                |status| status.set_ready(),
                |status| assert_eq!(status.begin_reload(), Some(Readiness::Ready)),
                |status| status.cancel_reload(Readiness::Ready),
                |status| assert_eq!(status.begin_reload(), Some(Readiness::Ready)),
                |status| status.set_step("Looking for the GPU"),
                |status| status.mark_prepared(),
                |status| status.end_superlink_wait(),
                |status| status.set_ready(),
            ]),
            [
                None,
                Some(Message::Ready("Running".into())),
                Some(Message::Reloading),
                Some(Message::Ready("Running".into())),
                Some(Message::Reloading),
                status("Looking for the GPU"),
                None,
                None,
                Some(Message::Ready("Running".into())),
            ]
        );
    }

    #[test]
    fn unit_that_waits_for_its_superlink_is_ready() {
        assert_eq!(
            messages(&[
                |status| status.set_superlink_wait("attempt 2".into()),
                |status| status.mark_prepared(),
                |status| status.set_superlink_wait("attempt 3".into()),
                |status| {
                    status.end_superlink_wait();
                    status.set_step("Starting the container");
                },
            ]),
            [
                status("attempt 2"),
                Some(Message::Ready("attempt 2".into())),
                status("attempt 3"),
                status("Starting the container"),
            ]
        );
    }
}
