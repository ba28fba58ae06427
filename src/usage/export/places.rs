//! How many exports may be under way.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::{
    error::{Error, Result},
    model::UserId,
};

/// Exports at a time: each holds a batch of records for as long as its reader takes.
const MAX_EXPORTS: usize = 64;

/// Of those, exports that one user reads.
const MAX_EXPORTS_OF_USER: usize = 4;

/// When to ask for a place again: exports take a while.
const RETRY: Duration = Duration::from_secs(5);

/// The places of this process.
#[derive(Clone, Default)]
pub(in crate::usage) struct ExportPlaces(Arc<Mutex<Taken>>);

#[derive(Default)]
struct Taken {
    all: usize,
    by_user: HashMap<UserId, usize>,
}

/// Free again when dropped.
pub struct ExportPlace {
    places: ExportPlaces,
    user: Option<UserId>,
}

impl ExportPlaces {
    /// A place; for a caller who is a user, one of theirs.
    ///
    /// # Errors
    /// `Overloaded`
    pub(in crate::usage) fn take(&self, user: Option<UserId>) -> Result<ExportPlace> {
        let mut taken = self.lock();
        let of_user = user.and_then(|user| taken.by_user.get(&user));
        if taken.all >= MAX_EXPORTS || of_user.is_some_and(|places| *places >= MAX_EXPORTS_OF_USER)
        {
            return Err(Error::Overloaded { retry_after: RETRY });
        }
        taken.all += 1;
        if let Some(user) = user {
            *taken.by_user.entry(user).or_default() += 1;
        }
        Ok(ExportPlace {
            places: self.clone(),
            user,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for ExportPlace {
    fn drop(&mut self) {
        let mut taken = self.places.lock();
        taken.all -= 1;
        let Some(user) = self.user else { return };
        if let Some(places) = taken.by_user.get_mut(&user) {
            *places -= 1;
            if *places == 0 {
                taken.by_user.remove(&user);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::UserId;

    #[test]
    fn a_user_has_some_places_and_all_have_some_more() {
        let places = ExportPlaces::default();
        let [user, other] = [1, 2].map(|n| Some(UserId(uuid::Uuid::from_u128(n))));
        let mut taken: Vec<ExportPlace> = (0..MAX_EXPORTS_OF_USER)
            .map(|_| places.take(user).expect("a free place"))
            .collect();
        assert!(places.take(user).is_err());
        taken.push(places.take(other).expect("a free place"));
        taken.extend((taken.len()..MAX_EXPORTS).map(|_| places.take(None).expect("a free place")));
        assert!(places.take(None).is_err());
        taken.remove(0);
        drop(places.take(user).expect("a free place"));
        taken.clear();
        let taken = places.lock();
        assert_eq!((taken.all, taken.by_user.len()), (0, 0));
    }
}
