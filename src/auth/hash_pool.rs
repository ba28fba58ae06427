use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
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
    queue_timeout: Duration,
    /// The threads end with it.
    queue: Arc<OpenQueue>,
}

type Work = Box<dyn FnOnce() + Send>;

/// What waits for a thread. A thread that has ended its work finds the next here: until somebody had handed
/// it over, a core would idle.
#[derive(Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Default)]
struct Waiting {
    /// In the order in which they came, which is that of their numbers.
    works: VecDeque<(u64, Work)>,
    next: u64,
    is_closed: bool,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, work: Work) -> u64 {
        let mut waiting = self.lock();
        let number = waiting.next;
        waiting.next += 1;
        waiting.works.push_back((number, work));
        drop(waiting);
        self.changed.notify_one();
        number
    }

    /// Takes back what no thread has taken yet.
    fn take_back(&self, number: u64) -> Option<Work> {
        let mut waiting = self.lock();
        let place = waiting.works.binary_search_by_key(&number, |(n, _)| *n);
        let (_, work) = waiting.works.remove(place.ok()?)?;
        Some(work)
    }

    /// What comes next, once there is something; `None` at the end.
    fn next(&self) -> Option<Work> {
        let mut waiting = self.lock();
        loop {
            if let Some((_, work)) = waiting.works.pop_front() {
                return Some(work);
            }
            if waiting.is_closed {
                return None;
            }
            let changed = self.changed.wait(waiting);
            waiting = changed.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Closes the queue with the last pool.
struct OpenQueue(Arc<Queue>);

impl Drop for OpenQueue {
    fn drop(&mut self) {
        self.0.lock().is_closed = true;
        self.0.changed.notify_all();
    }
}

/// Work of a call: taken back when that ends before a thread comes to it.
struct Queued<'a> {
    queue: &'a Queue,
    number: u64,
}

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        self.queue.take_back(self.number);
    }
}

impl HashPool {
    /// Starts the threads.
    ///
    /// # Errors
    /// `Internal` when the system gives none.
    pub(super) fn new(settings: &PasswordSettings) -> Result<Self> {
        let threads = config::or_cores(settings.threads);
        let queue = Arc::new(OpenQueue(Arc::default()));
        for number in 0..threads {
            let queue = queue.0.clone();
            let thread = thread::Builder::new().name(format!("hash-{number}"));
            thread
                .spawn(move || serve(&queue))
                .map_err(Error::internal)?;
        }
        Ok(Self {
            places: Arc::new(Semaphore::new(threads + settings.queue)),
            queue_timeout: settings.queue_timeout,
            queue,
        })
    }

    /// Runs `work` when a thread comes to it.
    ///
    /// Dropping the future before that, as the end of a call's deadline does, gives the place back and
    /// nothing is hashed; after that the work runs to its end and keeps its thread, so that abandoned calls
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
        let (answer, mut answered) = oneshot::channel();
        let queue = &*self.queue.0;
        let number = queue.push(Box::new(move || {
            let _ = answer.send(work());
        }));
        let queued = Queued { queue, number };
        let answer = match timeout(self.queue_timeout, &mut answered).await {
            Ok(answer) => answer,
            // Still waiting: nobody hashes it any more.
            Err(_) if queue.take_back(number).is_some() => return Err(overloaded()),
            Err(_) => answered.await,
        };
        drop(queued);
        answer.map_err(Error::internal)
    }
}

/// What each thread does.
fn serve(queue: &Queue) {
    // To step back needs no privileges; where it is refused all the same, hashes are computed at the
    // priority of everything else.
    let step_back = || {
        let nice = getpriority_process(None)?;
        setpriority_process(None, (nice + NICE).min(19))
    };
    if let Err(error) = step_back() {
        tracing::warn!(%error, "password hashes have the priority of everything else");
    }
    while let Some(work) = queue.next() {
        // Whoever waits hears of it, since their channel is dropped.
        let _ = catch_unwind(AssertUnwindSafe(work));
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, sync::mpsc, time::Instant};

    use futures_util::FutureExt as _;
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
        let (begin, begun) = mpsc::channel::<()>();
        let running = tokio::spawn({
            let pool = pool.clone();
            let work = move || {
                begin.send(()).expect("somebody waits");
                blocked.recv()
            };
            async move { pool.run(work).await }
        });
        while let Err(why) = begun.try_recv() {
            assert_eq!(why, mpsc::TryRecvError::Empty, "refused");
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
        assert!(pool.queue.0.lock().works.is_empty(), "kept for nobody");
        drop(release);
        assert!(running.await.expect("no panic").is_ok());
        assert_eq!(pool.run(|| 1).await.expect("free again"), 1);
        // The sender was dropped with the work.
        assert_eq!(was_hashed.recv(), Err(mpsc::RecvError));
        assert_eq!(pool.places.available_permits(), 9);
    }

    #[tokio::test]
    async fn what_has_begun_is_waited_for_beyond_the_time_in_the_queue() {
        let pool = pool(1, 0, Duration::from_millis(20));
        let (release, running) = taken(&pool).await;
        tokio::time::sleep(Duration::from_millis(60)).await;
        release.send(()).expect("the work waits");
        assert!(matches!(running.await.expect("no panic"), Ok(Ok(()))));
    }

    #[tokio::test]
    async fn those_who_wait_are_hashed_in_the_order_in_which_they_came() {
        let pool = pool(1, 8, Duration::from_secs(60));
        let (release, running) = taken(&pool).await;
        let (done, order) = mpsc::channel();
        let mut waiting: Vec<_> = (0..4)
            .map(|number| {
                let done = done.clone();
                Box::pin(pool.run(move || done.send(number).expect("somebody waits")))
            })
            .collect();
        for one in &mut waiting {
            assert!(one.now_or_never().is_none());
        }
        // One gives up: the others keep their places.
        drop(waiting.remove(1));
        drop(release);
        assert!(running.await.expect("no panic").is_ok());
        for one in waiting {
            one.await.expect("ran");
        }
        assert_eq!(order.try_iter().collect::<Vec<_>>(), [0, 2, 3]);
    }

    #[tokio::test]
    async fn a_panic_is_the_callers_alone() {
        let pool = pool(1, 0, Duration::from_secs(60));
        let panicked = pool.run(|| panic!("on purpose")).await;
        assert!(matches!(panicked, Err::<(), _>(Error::Internal(_))));
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
