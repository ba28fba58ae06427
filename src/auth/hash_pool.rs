use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
    time::Duration,
};

use rustix::process::{getpriority_process, setpriority_process};
use tokio::{
    sync::{Semaphore, oneshot},
    time::timeout,
};

use crate::{
    config::{self, PasswordSettings},
    error::{Error, Result},
};

/// How much the threads give way (nice of Linux): beside a thread that serves, about a tenth of a core.
/// At 19 it were a seventieth, and under load nobody could log in.
const NICE: i32 = 10;

/// Runs password hashes on a bounded number of threads of their own, with a bounded queue before them.
///
/// A hash is slow on purpose. Without bounds a flood of logins would take every core and delay
/// everything else; with them it is refused early, and what is not refused gives way to those who serve.
/// The threads are nobody else's: one that has stepped back may not come forward again without
/// privileges.
#[derive(Clone)]
pub(super) struct HashPool {
    /// Running and waiting together.
    places: Arc<Semaphore>,
    /// Running.
    turns: Arc<Semaphore>,
    queue_timeout: Duration,
    /// As many at once as there are turns, so that a thread is free for each. The threads end with it.
    work: mpsc::Sender<Work>,
}

type Work = Box<dyn FnOnce() + Send>;

impl HashPool {
    /// Starts the threads.
    ///
    /// # Errors
    /// `Internal` when the system gives none.
    pub(super) fn new(settings: &PasswordSettings) -> Result<Self> {
        let threads = config::or_cores(settings.threads);
        let (work, queue) = mpsc::channel();
        let queue = Arc::new(Mutex::new(queue));
        for number in 0..threads {
            let queue = queue.clone();
            let thread = thread::Builder::new().name(format!("hash-{number}"));
            thread
                .spawn(move || serve(&queue))
                .map_err(Error::internal)?;
        }
        Ok(Self {
            places: Arc::new(Semaphore::new(threads + settings.queue)),
            turns: Arc::new(Semaphore::new(threads)),
            queue_timeout: settings.queue_timeout,
            work,
        })
    }

    /// Runs `work` when its turn comes.
    ///
    /// Dropping the future before that, as the end of a call's deadline does, gives the place back and
    /// nothing is hashed; after that the work runs to its end and holds its turn, so that abandoned calls
    /// still count.
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
        let (answer, answered) = oneshot::channel();
        let work = Box::new(move || {
            // Nobody waits any more: they gave up before a thread came to it.
            if answer.is_closed() {
                return;
            }
            let done = work();
            drop(turn);
            let _ = answer.send(done);
        });
        self.work
            .send(work)
            .map_err(|_| Error::internal("no thread hashes"))?;
        answered.await.map_err(Error::internal)
    }
}

/// What each thread does.
fn serve(queue: &Mutex<mpsc::Receiver<Work>>) {
    // To step back needs no privileges; where it is refused all the same, hashes are computed at the
    // priority of everything else.
    let step_back = || {
        let nice = getpriority_process(None)?;
        setpriority_process(None, (nice + NICE).min(19))
    };
    if let Err(error) = step_back() {
        tracing::warn!(%error, "password hashes have the priority of everything else");
    }
    loop {
        // Held while waiting: the others wait behind it, and work for one of them wakes this one.
        let work = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(work) = work else {
            return;
        };
        // Whoever waits hears of it, since their channel is dropped.
        let _ = catch_unwind(AssertUnwindSafe(work));
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, sync::mpsc, time::Instant};

    use tokio::task::JoinHandle;

    use super::*;

    type Released = Result<Result<(), mpsc::RecvError>>;

    fn pool(threads: usize, queue: usize, queue_timeout: Duration) -> HashPool {
        HashPool::new(&PasswordSettings {
            threads,
            queue,
            queue_timeout,
            ..Default::default()
        })
        .expect("threads")
    }

    /// The one thread of a pool is busy until told otherwise.
    async fn taken(pool: &HashPool) -> (mpsc::Sender<()>, JoinHandle<Released>) {
        let (release, blocked) = mpsc::channel::<()>();
        let running = tokio::spawn({
            let pool = pool.clone();
            async move { pool.run(move || blocked.recv()).await }
        });
        while pool.turns.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        (release, running)
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
        let (release, running) = taken(&pool).await;
        assert!(matches!(
            pool.run(|| ()).await,
            Err(Error::Overloaded { .. })
        ));
        drop(release);
        assert!(running.await.expect("no panic").is_ok());
    }

    #[tokio::test]
    async fn a_flood_beyond_the_queue_is_shed_at_once() {
        let pool = pool(2, 4, Duration::from_secs(60));
        let (release, blocked) = mpsc::channel::<()>();
        let blocked = Arc::new(Mutex::new(blocked));
        let flood: Vec<_> = (0..100)
            .map(|_| {
                let (pool, blocked) = (pool.clone(), blocked.clone());
                tokio::spawn(async move {
                    pool.run(move || blocked.lock().expect("no panic").recv().is_ok())
                        .await
                })
            })
            .collect();
        let begun = Instant::now();
        let (mut shed, mut taken) = (0, Vec::new());
        for call in flood {
            // Those that are shed have ended before anything was hashed.
            tokio::task::yield_now().await;
            if call.is_finished() {
                let refused = call.await.expect("no panic");
                assert!(matches!(refused, Err(Error::Overloaded { .. })));
                shed += 1;
            } else {
                taken.push(call);
            }
        }
        assert_eq!((shed, taken.len()), (94, 6));
        assert!(begun.elapsed() < Duration::from_secs(10), "not at once");
        for _ in &taken {
            release.send(()).expect("some wait");
        }
        for call in taken {
            assert!(call.await.expect("no panic").expect("ran"));
        }
    }

    #[tokio::test]
    async fn whose_deadline_has_passed_is_not_hashed() {
        let pool = pool(1, 8, Duration::from_secs(60));
        let (release, running) = taken(&pool).await;
        let (hashed, was_hashed) = mpsc::channel::<()>();
        let late = pool.run(move || hashed.send(()));
        assert!(timeout(Duration::from_millis(20), late).await.is_err());
        drop(release);
        assert!(running.await.expect("no panic").is_ok());
        assert_eq!(pool.run(|| 1).await.expect("free again"), 1);
        // The sender was dropped with the work.
        assert_eq!(was_hashed.recv(), Err(mpsc::RecvError));
        assert_eq!(pool.places.available_permits(), 9);
    }

    #[tokio::test]
    async fn a_panic_is_the_callers_alone() {
        let pool = pool(1, 0, Duration::from_secs(60));
        let panicked = pool.run(|| panic!("on purpose")).await;
        assert!(matches!(panicked, Err::<(), _>(Error::Internal(_))));
        // The turn is given back a moment after the answer.
        assert_eq!(pool.run(|| 1).await.expect("the thread lives"), 1);
    }

    #[tokio::test]
    async fn hashes_give_way_to_those_who_serve() {
        // Of the thread that asks. The name may hold blanks; the nice value is the 17th behind it.
        let own = || {
            let stat = fs::read_to_string("/proc/thread-self/stat").expect("Linux");
            let (_, rest) = stat.rsplit_once(") ").expect("a name");
            let nice = rest.split(' ').nth(16).expect("a nice value");
            nice.parse::<i32>().expect("a number")
        };
        let pool = pool(2, 8, Duration::from_secs(60));
        let serving = own();
        for _ in 0..8 {
            let hashing = pool.run(own).await.expect("ran");
            assert_eq!(hashing, (serving + NICE).min(19));
        }
        assert_eq!(own(), serving, "only the hashes step back");
    }
}
