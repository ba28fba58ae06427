use std::{sync::Arc, time::Duration};

use tokio::{sync::Semaphore, time::timeout};

use crate::{
    config::{self, PasswordSettings},
    error::{Error, Result},
};

/// Runs password hashes on a bounded number of threads, with a bounded queue before them.
///
/// A hash is slow on purpose. Without bounds a flood of logins would take every core and delay
/// everything else; with them it is refused early.
#[derive(Clone)]
pub(super) struct HashPool {
    /// Running and waiting together.
    places: Arc<Semaphore>,
    /// Running.
    turns: Arc<Semaphore>,
    queue_timeout: Duration,
}

impl HashPool {
    pub(super) fn new(settings: &PasswordSettings) -> Self {
        let threads = config::or_cores(settings.threads);
        Self {
            places: Arc::new(Semaphore::new(threads + settings.queue)),
            turns: Arc::new(Semaphore::new(threads)),
            queue_timeout: settings.queue_timeout,
        }
    }

    /// Runs `work` when its turn comes.
    ///
    /// Dropping the future before the turn gives the place back; after that the work runs to its
    /// end and holds its turn, so that abandoned calls still count.
    ///
    /// # Errors
    /// `Overloaded` when the queue is full or the wait too long · `Internal` when `work` panics
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T> {
        let overloaded = || Error::Overloaded {
            retry_after: Duration::from_secs(1),
        };
        let _place = self.places.try_acquire().map_err(|_| overloaded())?;
        let turn = timeout(self.queue_timeout, self.turns.clone().acquire_owned())
            .await
            .map_err(|_| overloaded())?
            .map_err(Error::internal)?;
        tokio::task::spawn_blocking(move || {
            let _turn = turn;
            work()
        })
        .await
        .map_err(Error::internal)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn pool(threads: usize, queue: usize, queue_timeout: Duration) -> HashPool {
        HashPool::new(&PasswordSettings {
            threads,
            queue,
            queue_timeout,
            ..Default::default()
        })
    }

    #[tokio::test]
    async fn a_full_queue_is_refused_at_once_and_recovers() {
        let pool = pool(1, 1, Duration::from_secs(60));
        let (release, blocked) = mpsc::channel::<()>();
        let running = tokio::spawn({
            let pool = pool.clone();
            async move { pool.run(move || blocked.recv()).await }
        });
        let waiting = tokio::spawn({
            let pool = pool.clone();
            async move { pool.run(|| 1).await }
        });
        while pool.places.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        assert!(matches!(
            pool.run(|| 2).await,
            Err(Error::Overloaded { .. })
        ));
        release.send(()).expect("the work waits");
        running
            .await
            .expect("no panic")
            .expect("ran")
            .expect("released");
        assert_eq!(waiting.await.expect("no panic").expect("ran"), 1);
        assert_eq!(pool.run(|| 3).await.expect("free again"), 3);
    }

    #[tokio::test]
    async fn a_long_wait_is_refused() {
        let pool = pool(1, 8, Duration::from_millis(20));
        let (release, blocked) = mpsc::channel::<()>();
        let running = tokio::spawn({
            let pool = pool.clone();
            async move { pool.run(move || blocked.recv()).await }
        });
        while pool.turns.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        assert!(matches!(
            pool.run(|| ()).await,
            Err(Error::Overloaded { .. })
        ));
        drop(release);
        assert!(running.await.expect("no panic").is_ok());
    }
}
