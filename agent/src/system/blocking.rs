//! Blocking calls outside the runtime thread.

/// Runs a blocking function on a separate thread, so that the runtime thread keeps serving signals,
/// watchers and the watchdog. If the caller is dropped, the function still completes.
pub(crate) async fn run_blocking<T: Send + 'static>(
    function: impl FnOnce() -> T + Send + 'static,
) -> T {
    match tokio::task::spawn_blocking(function).await {
        Ok(value) => value,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // Cancelled: the runtime is shutting down, and this future with it.
            Err(_) => std::future::pending().await,
        },
    }
}
