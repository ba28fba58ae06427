use std::{fmt, str::FromStr};

use chrono::{DateTime, Datelike, Months, NaiveDate, NaiveTime, Utc};

use super::Violation;

/// A UTC calendar month, written `YYYY-MM`. Orders by time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Period {
    /// Its first day.
    first: NaiveDate,
}

impl Period {
    /// The month that holds `instant`.
    pub fn containing(instant: DateTime<Utc>) -> Self {
        let date = instant.date_naive();
        Self {
            first: date.with_day(1).expect("every month has a first day"),
        }
    }

    /// Its first instant.
    pub fn start(self) -> DateTime<Utc> {
        self.first.and_time(NaiveTime::MIN).and_utc()
    }

    /// The first instant after it.
    pub fn end(self) -> DateTime<Utc> {
        self.plus_months(1).start()
    }

    /// The month `months` later.
    pub fn plus_months(self, months: u32) -> Self {
        Self {
            first: self.first + Months::new(months),
        }
    }

    /// The month `months` earlier.
    pub fn minus_months(self, months: u32) -> Self {
        Self {
            first: self.first - Months::new(months),
        }
    }

    /// The month before.
    pub fn previous(self) -> Self {
        self.minus_months(1)
    }
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (year, month) = (self.first.year(), self.first.month());
        let Ok(year @ 0..=9999) = u32::try_from(year) else {
            return write!(f, "{year:04}-{month:02}");
        };
        // Each answer about quota says it: digits cost less than a formatter.
        let digit = |number: u32| b'0' + (number % 10) as u8;
        let [millennium, century, decade] = [year / 1000, year / 100, year / 10].map(digit);
        let text = [
            millennium,
            century,
            decade,
            digit(year),
            b'-',
            digit(month / 10),
            digit(month),
        ];
        f.write_str(str::from_utf8(&text).map_err(|_| fmt::Error)?)
    }
}

impl FromStr for Period {
    type Err = Violation;

    fn from_str(text: &str) -> Result<Self, Violation> {
        const SHAPE: &str = "must be a month of the form YYYY-MM, from 2000-01 to 2199-12";
        let bytes = text.as_bytes();
        let digits = |range: std::ops::Range<usize>| {
            bytes[range.clone()]
                .iter()
                .all(u8::is_ascii_digit)
                .then(|| text[range].parse::<u32>().ok())
                .flatten()
        };
        if bytes.len() != 7 || bytes[4] != b'-' {
            return Err(SHAPE.into());
        }
        let (Some(year @ 2000..=2199), Some(month)) = (digits(0..4), digits(5..7)) else {
            return Err(SHAPE.into());
        };
        NaiveDate::from_ymd_opt(year as i32, month, 1)
            .map(|first| Self { first })
            .ok_or(SHAPE.into())
    }
}

#[cfg(test)]
mod tests {
    use chrono::TimeZone as _;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn december_ends_in_january() {
        let december: Period = "2026-12".parse().expect("valid");
        assert_eq!(
            december.end(),
            Utc.with_ymd_and_hms(2027, 1, 1, 0, 0, 0).unwrap()
        );
        assert_eq!(december.plus_months(1).to_string(), "2027-01");
        assert_eq!(december.plus_months(1).previous(), december);
    }

    #[test]
    fn refuses_what_is_no_month() {
        for bad in [
            "",
            "2026",
            "2026-13",
            "2026-00",
            "2026-1",
            "2026/01",
            "+026-01",
            "1999-12",
            "２０26-1",
        ] {
            assert!(bad.parse::<Period>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn every_instant_lies_in_exactly_its_month(secs in 946_684_800_i64..7_258_118_400) {
            let instant = Utc.timestamp_opt(secs, 0).unwrap();
            let period = Period::containing(instant);
            prop_assert!(period.start() <= instant && instant < period.end());
            prop_assert_eq!(period.to_string(), instant.format("%Y-%m").to_string());
            prop_assert_eq!(period.to_string().parse::<Period>(), Ok(period));
            prop_assert_eq!(period.plus_months(1).start(), period.end());
        }
    }
}
