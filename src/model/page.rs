use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::Violation;

/// Which page of a list is wanted (AIP-158).
#[derive(Clone, Debug)]
pub struct PageRequest<C> {
    /// 1 to [`PageRequest::MAX_SIZE`].
    pub size: i64,
    /// The last item of the page before.
    pub after: Option<C>,
    /// Of the list: the next page's token is bound to it.
    tag: [u8; 4],
}

/// A page of a list.
#[derive(Clone, Debug)]
pub struct Page<T> {
    pub items: Vec<T>,
    /// Opaque; `None` on the last page.
    pub next_token: Option<String>,
}

impl<T> Page<T> {
    pub fn map<U>(self, convert: impl FnMut(T) -> U) -> Page<U> {
        Page {
            items: self.items.into_iter().map(convert).collect(),
            next_token: self.next_token,
        }
    }
}

/// The position of an item in a keyset-ordered list.
pub trait Cursor: Sized {
    fn to_bytes(&self) -> Vec<u8>;
    fn from_bytes(bytes: &[u8]) -> Option<Self>;
}

impl<C: Cursor> PageRequest<C> {
    pub const DEFAULT_SIZE: i64 = 50;
    pub const MAX_SIZE: i64 = 1000;

    /// Reads `page_size`: 0 means the default, more than the largest means the largest.
    pub fn size(page_size: i32) -> Result<i64, Violation> {
        match i64::from(page_size) {
            ..0 => Err("must not be negative".into()),
            0 => Ok(Self::DEFAULT_SIZE),
            size => Ok(size.min(Self::MAX_SIZE)),
        }
    }

    /// A page of at most `size` items behind `after`. `list` names the list and all that it was asked
    /// for.
    pub fn new(size: i64, after: Option<C>, list: &str) -> Self {
        let tag = tag(list);
        Self { size, after, tag }
    }

    /// Reads `page_token`. A token of another list is refused, since it would silently skip items.
    pub fn after(page_token: &str, list: &str) -> Result<Option<C>, Violation> {
        if page_token.is_empty() {
            return Ok(None);
        }
        let refused = || Violation::from("must be a next_page_token of the same list");
        let bytes = URL_SAFE_NO_PAD.decode(page_token).map_err(|_| refused())?;
        let (bound_to, cursor) = bytes.split_at_checked(4).ok_or_else(refused)?;
        if bound_to != tag(list) {
            return Err(refused());
        }
        C::from_bytes(cursor).map(Some).ok_or_else(refused)
    }
}

impl<T> Page<T> {
    /// Bytes that a page takes at most: clients of gRPC take messages of 4 MiB unless they say more.
    const MAX_BYTES: usize = 3 << 20;

    /// Makes the page that was asked for of `rows`, which hold one more where there are more.
    pub fn from_rows<C: Cursor>(
        rows: Vec<T>,
        asked: &PageRequest<C>,
        cursor: impl Fn(&T) -> C,
    ) -> Self {
        Self::cut(rows, asked.size, asked, cursor)
    }

    /// As [`Self::from_rows`], of items so large that a page may hold fewer than were asked for.
    pub fn from_large_rows<C: Cursor>(
        rows: Vec<T>,
        asked: &PageRequest<C>,
        cursor: impl Fn(&T) -> C,
        bytes: impl Fn(&T) -> usize,
    ) -> Self {
        let mut left = Self::MAX_BYTES;
        let fits = |row: &&T| {
            let rest = left.checked_sub(bytes(row));
            left = rest.unwrap_or_default();
            rest.is_some()
        };
        let fit = i64::try_from(rows.iter().take_while(fits).count()).unwrap_or(i64::MAX);
        Self::cut(rows, asked.size.min(fit.max(1)), asked, cursor)
    }

    fn cut<C: Cursor>(
        mut rows: Vec<T>,
        size: i64,
        asked: &PageRequest<C>,
        cursor: impl Fn(&T) -> C,
    ) -> Self {
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        let more = rows.len() > size;
        rows.truncate(size);
        let next_token = rows.last().filter(|_| more).map(|last| {
            let mut bytes = asked.tag.to_vec();
            bytes.extend(cursor(last).to_bytes());
            URL_SAFE_NO_PAD.encode(bytes)
        });
        Self {
            items: rows,
            next_token,
        }
    }
}

fn tag(list: &str) -> [u8; 4] {
    crc32fast::hash(list.as_bytes()).to_be_bytes()
}

impl Cursor for Uuid {
    fn to_bytes(&self) -> Vec<u8> {
        self.as_bytes().to_vec()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        Self::from_slice(bytes).ok()
    }
}

/// Of a list ordered by time; to the microsecond, as the database has it.
impl Cursor for (DateTime<Utc>, Uuid) {
    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = self.0.timestamp_micros().to_be_bytes().to_vec();
        bytes.extend(self.1.as_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (micros, id) = bytes.split_first_chunk::<8>()?;
        // Nothing is older; the database knows fewer years than a number can name.
        let micros = u64::try_from(i64::from_be_bytes(*micros)).ok()?;
        let at = DateTime::from_timestamp_micros(micros.cast_signed())?;
        Some((at, Uuid::from_slice(id).ok()?))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_token_leads_to_the_next_page_of_the_same_list_only() {
        let rows: Vec<Uuid> = (0..3).map(|_| Uuid::now_v7()).collect();
        let two = PageRequest::new(2, None, "tier=free");
        let page = Page::from_rows(rows.clone(), &two, |id| *id);
        assert_eq!(page.items, rows[..2]);
        let token = page.next_token.expect("a third row exists");
        assert_eq!(
            PageRequest::<Uuid>::after(&token, "tier=free"),
            Ok(Some(rows[1]))
        );
        assert!(PageRequest::<Uuid>::after(&token, "tier=starter").is_err());
        let all = PageRequest::new(3, None, "");
        assert!(Page::from_rows(rows, &all, |id| *id).next_token.is_none());
    }

    #[test]
    fn a_page_of_large_items_ends_before_it_is_too_large_and_is_never_empty() {
        let rows: Vec<Uuid> = (0..3).map(|_| Uuid::now_v7()).collect();
        let asked = PageRequest::new(3, None, "");
        for (bytes, items, has_more) in [
            (1, 3, false),
            ((3 << 20) / 3, 3, false),
            ((3 << 20) / 2, 2, true),
            (usize::MAX, 1, true),
        ] {
            let page = Page::from_large_rows(rows.clone(), &asked, |id| *id, |_| bytes);
            assert_eq!(page.items, rows[..items]);
            assert_eq!(page.next_token.is_some(), has_more);
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_token_or_refused(text in any::<String>()) {
            let _ = PageRequest::<Uuid>::after(&text, "");
        }
    }
}
