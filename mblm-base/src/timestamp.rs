//! The current time, in UTC, as text for logs and folder names.

use std::time::{SystemTime, UNIX_EPOCH};

/// A moment in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timestamp {
    date: (u64, u64, u64),
    time: (u64, u64, u64),
    micros: u32,
}

impl Timestamp {
    /// Now.
    pub fn now() -> Self {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self::from_unix(since_1970.as_secs(), since_1970.subsec_micros())
    }

    fn from_unix(seconds: u64, micros: u32) -> Self {
        let (mut days, second) = (seconds / 86_400, seconds % 86_400);
        let is_leap = |year: u64| (year.is_multiple_of(4) && !year.is_multiple_of(100)) || year.is_multiple_of(400);
        let mut year = 1970;
        while days >= 365 + is_leap(year) as u64 {
            days -= 365 + is_leap(year) as u64;
            year += 1;
        }
        let mut month = 1;
        for len in [31, 28 + is_leap(year) as u64, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
            if days < len {
                break;
            }
            days -= len;
            month += 1;
        }
        let time = (second / 3600, second / 60 % 60, second % 60);
        Timestamp { date: (year, month, days + 1), time, micros }
    }

    /// Reads what [`Display`](std::fmt::Display) writes, with or without a fraction of a second.
    pub fn parse(text: &str) -> Option<Self> {
        let (date, time) = text.trim().split_once([' ', 'T'])?;
        let three = |text: &str, by| -> Option<(u64, u64, u64)> {
            let mut numbers = text.splitn(3, by).map(|part: &str| part.parse().ok());
            Some((numbers.next()??, numbers.next()??, numbers.next()??))
        };
        let (time, fraction) = time.split_once('.').unwrap_or((time, "0"));
        let (date @ (year, month, day), time) = (three(date, '-')?, three(time, ':')?);
        let micros = format!("{fraction:0<6}").get(..6)?.parse().ok()?;
        let is_date = (1970..10_000).contains(&year) && (1..=12).contains(&month) && (1..=31).contains(&day);
        let is_time = time.0 < 24 && time.1 < 60 && time.2 <= 60;
        (is_date && is_time).then_some(Timestamp { date, time, micros })
    }

    /// Seconds since 1970.
    pub fn seconds(&self) -> f64 {
        let ((year, month, day), (hour, minute, second)) = (self.date, self.time);
        // Years that begin in March end with the leap day.
        let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
        let days = year * 365 + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1 - 719_468;
        (days * 86_400 + hour * 3600 + minute * 60 + second) as f64 + f64::from(self.micros) / 1e6
    }

    /// `20240229-130507`, for names of folders.
    pub fn compact(&self) -> String {
        let ((year, month, day), (hour, minute, second)) = (self.date, self.time);
        format!("{year:04}{month:02}{day:02}-{hour:02}{minute:02}{second:02}")
    }
}

/// `2024-02-29 13:05:07.000042`, as in the reference package's logs.
impl std::fmt::Display for Timestamp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ((year, month, day), (hour, minute, second)) = (self.date, self.time);
        write!(f, "{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{:06}", self.micros)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_read_back() {
        for seconds in [0, 951_782_400, 1_709_211_907, 4_107_542_399, 4_107_542_400] {
            let moment = Timestamp::from_unix(seconds, 250_000);
            assert_eq!(Timestamp::parse(&moment.to_string()), Some(moment));
            assert_eq!(moment.seconds(), seconds as f64 + 0.25);
        }
        let short = Timestamp::parse("2024-02-29T13:05:07.5").unwrap();
        assert_eq!((short.seconds(), short.micros), (1_709_211_907.5, 500_000));
        for text in ["", "2024-02-29", "2024-13-01 00:00:00", "2024-12-01 18446744073709551615:00:00", "a-b-c d:e:f"] {
            assert_eq!(Timestamp::parse(text), None, "{text}");
        }
    }

    #[test]
    fn known_moments() {
        assert_eq!(Timestamp::from_unix(0, 0).to_string(), "1970-01-01 00:00:00.000000");
        let leap_day = Timestamp::from_unix(1_709_211_907, 42);
        assert_eq!(leap_day.to_string(), "2024-02-29 13:05:07.000042");
        assert_eq!(leap_day.compact(), "20240229-130507");
        assert_eq!(Timestamp::from_unix(4_107_542_399, 0).to_string(), "2100-02-28 23:59:59.000000");
        assert_eq!(Timestamp::from_unix(4_107_542_400, 0).to_string(), "2100-03-01 00:00:00.000000");
        assert_eq!(Timestamp::from_unix(1_735_689_599, 0).to_string(), "2024-12-31 23:59:59.000000");
    }
}
