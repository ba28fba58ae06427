use tokio::sync::watch;

/// Counts the work that goes on when its caller is gone, for the end of the server to wait for it.
/// Clones count together.
#[derive(Clone, Default)]
pub struct Afterwards(watch::Sender<usize>);

/// Work that is under way, until it is dropped.
pub(super) struct Begun {
    count: watch::Sender<usize>,
    with_others: usize,
}

impl Afterwards {
    pub(super) fn begin(&self) -> Begun {
        let mut with_others = 0;
        self.0.send_modify(|count| {
            *count += 1;
            with_others = *count;
        });
        Begun {
            count: self.0.clone(),
            with_others,
        }
    }

    /// Returns when no work is under way.
    pub async fn finished(&self) {
        // An error would mean that the sender is gone, which is here.
        let _ = self.0.subscribe().wait_for(|count| *count == 0).await;
    }
}

impl Begun {
    /// How much was under way when it began, itself included.
    pub(super) fn with_others(&self) -> usize {
        self.with_others
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        self.count.send_modify(|count| *count -= 1);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[test]
    fn all_that_has_begun_is_waited_for() {
        let afterwards = Afterwards::default();
        let is_finished = || afterwards.finished().now_or_never().is_some();
        assert!(is_finished());
        let (first, second) = (afterwards.begin(), afterwards.clone().begin());
        assert_eq!((first.with_others(), second.with_others()), (1, 2));
        assert!(!is_finished());
        drop(first);
        assert!(!is_finished());
        drop(second);
        assert!(is_finished());
    }
}
